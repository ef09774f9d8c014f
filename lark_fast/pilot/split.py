"""Which problems a pilot trains on and which it holds out; no problem is both.

DIR/pool.jsonl       the candidates to select from
DIR/held-out.jsonl   all candidates of the problems that nobody trains on; ``measured``: their loss counts
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lark_fast.errors import RejectError, UserError
from lark_fast.files import atomic_open
from lark_fast.hashing import draw, hash_fields
from lark_fast.pilot.config import PilotConfig
from lark_fast.pool.faults import Faults
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
    wanted, faults = _conditions(config), Faults()
    counts: dict[str, int] = defaultdict(int)
    for record in _records(config.pool, "looking for problems", wanted, faults):
        counts[record.key[0]] += 1
    for condition in wanted if counts or not faults.count else ():
        condition.refuse_unmet()
    names = sorted(counts, key=lambda name: draw(0, name))
    if len(names) < 2:
        problems = f"has {len(names)} problem(s); a pilot needs some to hold out"
        raise UserError(f"--pool {' '.join(config.pool)}: {problems}{faults.told()}")
    held = 0 if config.held_out else min(config.held_out_problems, max(1, len(names) // 5))
    trained = names[held : held + config.problems]
    told = (f"{name} {counts[name]}".encode("utf-8", "surrogatepass") for name in (*names[:held], "", *trained))
    return Names(trained=frozenset(trained), held_out=frozenset(names[:held]), hash=hash_fields(*told, size=16).hex())


def write_split(config: PilotConfig, names: Names, renderer: Renderer) -> Split:
    """Write the three files into ``out``; what the student cannot read is left out.

    Raises:
        UserError: there is nothing to train on or to measure, or a held-out problem is in the pool.
    """
    faults = Faults()
    drawn, pool = names.held_out | names.trained, " ".join(config.pool)
    with ExitStack() as stack:
        files = _Files(config, stack)
        for record in _once(_records(config.pool, "dividing the pool", _conditions(config), faults, renderer, drawn)):
            if record.key[0] in names.trained:
                files.put(POOL, record)
                files.trained_problems.add(record.key[0])
            else:
                files.hold_out(record)
        if not files.counts[POOL]:
            raise UserError(f"--pool {pool}: no trajectory can be trained on{faults.told()}")
        if config.held_out:
            others = [config.held_out]
            for record in _once(_records(others, "reading --held-out", (), faults, renderer)):
                if record.key[0] in names.trained:
                    raise UserError(
                        f"{record.source}:{record.line}: problem {record.key[0]!r} is in --pool too, and would be "
                        "trained on; take it out of one of them"
                    )
                files.hold_out(record)
        files.refuse_nothing_to_measure()
    return Split(
        pool_problems=len(files.trained_problems),
        pool_trajectories=files.counts[POOL],
        held_out_trajectories=files.counts[HELD_OUT],
        measured=tuple(files.measured),
        rejected=faults.count,
        first_reject=faults.first,
        content=files.digest.hexdigest(),
    )


class _Files:
    """The three files, until the stack closes them."""

    def __init__(self, config: PilotConfig, stack: ExitStack) -> None:
        self._files = {name: stack.enter_context(atomic_open(Path(config.out, name))) for name in FILES}
        self._fit = [Condition(text, "--held-out-where") for text in config.held_out_where]
        self.counts, self.measured = dict.fromkeys(FILES, 0), list[tuple[str, str]]()
        self.trained_problems = set[str]()
        self.digest = hashlib.sha256()

    def put(self, name: str, record: Record) -> None:
        line = json.dumps(_as_json(record)) + "\n"
        self.digest.update(f"{name} {line}".encode())
        self._files[name].write(line)
        self.counts[name] += 1

    def hold_out(self, record: Record) -> None:
        self.put(HELD_OUT, record)
        # Every condition is asked, so that each knows whether it ever holds.
        if all([condition.holds(record) for condition in self._fit]):
            self.measured.append(record.key)
            self.put(MEASURED, record)

    def refuse_nothing_to_measure(self) -> None:
        for condition in self._fit:
            condition.refuse_unmet()
        if not self.measured:
            raise UserError("there is no held-out trajectory to measure the loss on; give other --held-out-where")


def _once(records: Iterable[Record]) -> Iterator[Record]:
    """Those whose key did not come before."""
    seen: set[tuple[str, str]] = set()
    for record in records:
        if record.key not in seen:
            seen.add(record.key)
            yield record


def _conditions(config: PilotConfig) -> list[Condition]:
    return [Condition(text) for text in config.where]


def _records(
    paths: Sequence[str],
    doing: str,
    wanted: Iterable[Condition],
    faults: Faults | None = None,
    renderer: Renderer | None = None,
    among: Collection[str] | None = None,
) -> Iterator[Record]:
    """Those of some problems for which all conditions hold; with a renderer, which the student can read.

    What cannot be read is added to ``faults``.
    """
    pool = Pool(paths)
    with track(doing, pool.total_bytes) as progress:
        for item in pool.read():
            progress.update(pool.bytes_read)
            fault = item.reason if isinstance(item, Rejected) else ""
            if not fault and among is not None and item.key[0] not in among:
                continue
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
                faults.add(item.source, item.line, fault)


def _as_json(record: Record) -> dict[str, Any]:
    names = {"problem_id": record.problem_id, "candidate_id": record.candidate_id, "teacher": record.teacher}
    text = {"messages": record.messages, "input_ids": record.input_ids, "labels": record.labels}
    extra = {name: value for name, value in record.extra.items() if name not in _OWN_COLUMNS}
    return names | {name: value for name, value in text.items() if value is not None} | extra
