"""Which problems a pilot trains on and which it holds out; no problem is both.

DIR/pool.jsonl       the candidates to select from
DIR/held-out.jsonl   all candidates of the problems that nobody trains on; ``measured``: their loss counts
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lark_fast.errors import RejectError, UserError
from lark_fast.files import atomic_open
from lark_fast.hashing import draw, hash_fields
from lark_fast.pilot.config import PilotConfig
from lark_fast.pool.reading import Pool, Rejected
from lark_fast.pool.records import Record
from lark_fast.progress import track
from lark_fast.rendering.renderer import Renderer
from lark_fast.selection.filters import Condition

POOL, HELD_OUT, MEASURED = "pool.jsonl", "held-out.jsonl", "measured.jsonl"
FILES = (POOL, HELD_OUT, MEASURED)
_OWN_COLUMNS = ("weight", "meta")  # of a selection, which the pilot makes itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Problems by what becomes of them, and a hash of the choice."""

    trained: frozenset[str]
    held_out: frozenset[str]
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What was written.

    Attributes:
        pool_problems, pool_trajectories: to train on.
        measured: problem and candidate of each trajectory whose loss counts, in the order of measured.jsonl.
        rejected: records that cannot be used.
        content: hash of the files.
    """

    pool_problems: int
    pool_trajectories: int
    held_out_trajectories: int
    measured: tuple[tuple[str, str], ...]
    rejected: int
    first_reject: str  # "" where there is none
    content: str


def choose_problems(config: PilotConfig) -> Names:
    """Read the pool's ids and draw.

    Raises:
        UserError: fewer than two problems, or nothing for which ``where`` holds.
    """
    wanted = _conditions(config)
    counts: dict[str, int] = defaultdict(int)
    for record in _records(config.pool, "looking for problems", wanted):
        counts[record.key[0]] += 1
    for condition in wanted:
        condition.refuse_unmet()
    names = sorted(counts, key=lambda name: draw(0, name))
    if len(names) < 2:
        raise UserError(f"--pool {' '.join(config.pool)}: has {len(names)} problem(s); a pilot needs some to hold out")
    held = 0 if config.held_out else min(config.held_out_problems, max(1, len(names) // 5))
    trained = names[held : held + config.problems]
    told = (f"{name} {counts[name]}".encode("utf-8", "surrogatepass") for name in (*names[:held], "", *trained))
    return Names(trained=frozenset(trained), held_out=frozenset(names[:held]), hash=hash_fields(*told, size=16).hex())


def write_split(config: PilotConfig, names: Names, renderer: Renderer) -> Split:
    """Write the three files into ``out``; what the student cannot read is left out.

    Raises:
        UserError: there is nothing to measure, or a held-out problem is in the pool.
    """
    out, digest = Path(config.out), hashlib.sha256()
    measured: list[tuple[str, str]] = []
    counts, faults = {POOL: 0, HELD_OUT: 0}, list[str]()
    fit = [Condition(text, "--held-out-where") for text in config.held_out_where]
    seen: set[tuple[str, str]] = set()

    def put(name: str, file: Any, record: Record) -> None:
        line = json.dumps(_as_json(record)) + "\n"
        digest.update(f"{name} {line}".encode())
        file.write(line)

    with (
        atomic_open(out / POOL) as pool,
        atomic_open(out / HELD_OUT) as held_out,
        atomic_open(out / MEASURED) as to_measure,
    ):

        def hold_out(record: Record) -> None:
            counts[HELD_OUT] += 1
            put(HELD_OUT, held_out, record)
            # Every condition is asked, so that each knows whether it ever holds.
            if all([condition.holds(record) for condition in fit]):
                measured.append(record.key)
                put(MEASURED, to_measure, record)

        for record in _records(config.pool, "dividing the pool", _conditions(config), faults, renderer):
            if record.key in seen:
                continue
            seen.add(record.key)
            if record.key[0] in names.held_out:
                hold_out(record)
            elif record.key[0] in names.trained:
                counts[POOL] += 1
                put(POOL, pool, record)
        if not counts[POOL]:
            why = f"; the first of {len(faults):,}: {faults[0]}" if faults else ""
            raise UserError(f"--pool {' '.join(config.pool)}: no trajectory can be trained on{why}")
        seen.clear()
        more = [config.held_out] if config.held_out else []
        for record in _records(more, "reading --held-out", _conditions(config), faults, renderer) if more else ():
            if record.key[0] in names.trained:
                raise UserError(
                    f"{record.source}:{record.line}: problem {record.key[0]!r} is in --pool too, and would be trained "
                    "on; take it out of one of them"
                )
            if record.key not in seen:
                seen.add(record.key)
                hold_out(record)
        for condition in fit:
            condition.refuse_unmet()
        if not measured:
            raise UserError("there is no held-out trajectory to measure the loss on; give other --held-out-where")
    return Split(
        pool_problems=len(names.trained),
        pool_trajectories=counts[POOL],
        held_out_trajectories=counts[HELD_OUT],
        measured=tuple(measured),
        rejected=len(faults),
        first_reject=faults[0] if faults else "",
        content=digest.hexdigest(),
    )


def _conditions(config: PilotConfig) -> list[Condition]:
    return [Condition(text) for text in config.where]


def _records(
    paths: Sequence[str],
    doing: str,
    wanted: Iterable[Condition],
    faults: list[str] | None = None,
    renderer: Renderer | None = None,
) -> Iterator[Record]:
    """Those for which all conditions hold and, with a renderer, which the student can read; others are ``faults``."""
    pool = Pool(paths)
    with track(doing, pool.total_bytes) as progress:
        for item in pool.read():
            progress.update(pool.bytes_read)
            fault = item.reason if isinstance(item, Rejected) else ""
            if not fault and not all([condition.holds(item) for condition in wanted]):
                continue
            if not fault and renderer is not None:
                try:
                    renderer(item)
                except RejectError as error:
                    fault = str(error)
            if not fault:
                yield item
            elif faults is not None:
                faults.append(f"{item.source}:{item.line}: {fault}")


def _as_json(record: Record) -> dict[str, Any]:
    names = {"problem_id": record.problem_id, "candidate_id": record.candidate_id, "teacher": record.teacher}
    text = {"messages": record.messages, "input_ids": record.input_ids, "labels": record.labels}
    extra = {name: value for name, value in record.extra.items() if name not in _OWN_COLUMNS}
    return names | {name: value for name, value in text.items() if value is not None} | extra
