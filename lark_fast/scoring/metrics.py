"""The account of a scoring run: what went through it and where its time went, and the log of that, metrics.jsonl."""

import json
import math
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 16  # of a log that is there already: more than any line


@dataclass(slots=True, kw_only=True)
class Account:
    """Counts and seconds of a run so far. Shares and rates are NaN as long as there is nothing to divide by."""

    records: int = 0  # read from the pool
    scored: int = 0  # in this run
    kept: int = 0  # scored by an earlier run
    rejected: int = 0
    input_tokens: int = 0  # of the trajectories scored in this run
    passed_tokens: int = 0  # that went through the model for them; a race spares some, see ``lark_fast.racing``
    scored_tokens: int = 0  # of these, those that are scored
    head_tokens: int = 0  # of these, those that met the head: all, but with --head-share
    local_tokens: int = 0  # that went through the model once more, as context or step of a local score
    padded_tokens: int = 0  # that went through the model beside them; 0 when packed
    forward_flop: float = 0.0  # see ``lark_fast.flop``
    packs: int = 0  # forward passes
    out_of_memory: int = 0  # times that memory ran out, and a pack was made smaller
    lost_processes: int = 0  # times that a process with the student was lost, and its passes were done again
    devices: int = 1  # that passes run on at a time
    seconds: float = 0.0  # from the first record to the last row
    device_seconds: float = 0.0  # of these, a forward pass was under way on a device, its own gaps included; their sum
    waiting_seconds: float = 0.0  # and waited for input
    rendered_tokens: int = 0  # of the trajectories rendered in this run
    render_seconds: float = 0.0  # of reading and rendering, sum over workers
    write_seconds: float = 0.0
    finish_seconds: float = 0.0  # after ``seconds``: rho and g_hat of the whole store

    @property
    def tokens_per_second(self) -> float:
        """Input tokens a second, rendering and writing included."""
        return _over(self.input_tokens, self.seconds)

    def ceiling_share(self, ceiling: float) -> float:
        """The FLOP/s of the run over ``ceiling``, those of the machine's best matrix product."""
        return _over(_over(self.forward_flop, self.seconds), ceiling)

    @property
    def device_busy_share(self) -> float:
        """Of the run's time, the share in which a forward pass was under way; the mean over devices."""
        return _over(self.device_seconds, self.seconds * self.devices)

    @property
    def rendered_tokens_per_second(self) -> float:
        """Input tokens that one worker renders a second."""
        return _over(self.rendered_tokens, self.render_seconds)

    @property
    def writing_share(self) -> float:
        """Of the run's time, the share in which rows were written (beside the passes or not)."""
        return _over(self.write_seconds, self.seconds)

    @property
    def padding_share(self) -> float:
        """Of the tokens that went through the model, the share that was padding."""
        return _over(self.padded_tokens, self.input_tokens + self.local_tokens + self.padded_tokens)

    def as_json(self, ceiling: float = math.nan) -> dict[str, Any]:
        """All of it by name, flat; what is not known is None. ``matmul_flop_per_second`` is the ceiling."""
        derived = {
            "tokens_per_second": self.tokens_per_second,
            "matmul_flop_per_second": ceiling,
            "ceiling_share": self.ceiling_share(ceiling),
            "device_busy_share": self.device_busy_share,
            "rendered_tokens_per_second": self.rendered_tokens_per_second,
            "writing_share": self.writing_share,
            "padding_share": self.padding_share,
        }
        return {name: json_number(value) for name, value in (asdict(self) | derived).items()}


class MetricsLog:
    """metrics.jsonl: a line of the account every so often and one at the end of a run, over all runs of a directory.

    Every line has ``run`` (1, 2, ...: which run of the directory), ``time`` (ISO 8601, UTC), ``end`` (whether it is
    the run's last) and the fields of ``Account.as_json``, counted from the start of that run. A line goes out in one
    write; what a killed run left of one is cut off.

    Args:
        path: of the file; made if need be.
        every_seconds: between lines.

    Raises:
        OSError: the file cannot be read or written, here and in every method.
    """

    def __init__(self, path: str | PathLike[str], every_seconds: float = 10.0) -> None:
        self.path, self.every_seconds = Path(path), every_seconds
        self.run = _mend(self.path) + 1
        self._last_line = time.monotonic()

    def update(self, account: Account, ceiling: float = math.nan) -> None:
        """Write a line if it is time for one."""
        if time.monotonic() - self._last_line >= self.every_seconds:
            self._write(account, ceiling, end=False)

    def finish(self, account: Account, ceiling: float = math.nan) -> None:
        """Write the last line of a run, whether it came to its end or was stopped."""
        self._write(account, ceiling, end=True)

    def _write(self, account: Account, ceiling: float, *, end: bool) -> None:
        self._last_line = time.monotonic()
        head = {"run": self.run, "time": datetime.now(UTC).isoformat(timespec="seconds"), "end": end}
        line = json.dumps(head | account.as_json(ceiling), allow_nan=False) + "\n"
        with open(self.path, "ab", buffering=0) as stream:
            stream.write(line.encode())


def _mend(path: Path) -> int:
    """Make the next line of a log start on a line of its own; returns the number of the last run in it, 0 if none."""
    with open(path, "a+b") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - TAIL_BYTES))
        lines = stream.read().split(b"\n")
        if torn := lines.pop():
            if _run_of(torn):  # whole but for its end
                lines.append(torn)
                stream.write(b"\n")
            elif len(torn) < TAIL_BYTES:
                stream.truncate(size - len(torn))
            else:  # not a line of ours
                stream.write(b"\n")
    return next(filter(None, map(_run_of, reversed(lines))), 0)


def _run_of(line: bytes) -> int:
    """The run that a line of the log belongs to, 0 where it is no such line."""
    try:
        run = json.loads(line)["run"]
    except (ValueError, KeyError, TypeError):
        return 0
    return run if isinstance(run, int) and run > 0 else 0


def _over(amount: float, of: float) -> float:
    return amount / of if of else math.nan


def json_number(value: float) -> float | None:
    """A number as JSON can hold it, with six digits where it is not whole; None for NaN and infinity."""
    if isinstance(value, Integral):
        return int(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None
