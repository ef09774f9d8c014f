"""Some problems of a pool, with some of their candidates as token ids, the same whatever the pool's order is."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lark_fast.errors import RejectError, UserError
from lark_fast.hashing import draw, hash_fields
from lark_fast.pool.faults import Faults
from lark_fast.pool.reading import Pool, Rejected
from lark_fast.pool.records import Record
from lark_fast.progress import track
from lark_fast.rendering.renderer import Rendered, Renderer
from lark_fast.selection.filters import Condition


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A trajectory of a problem."""

    record: Record
    rendered: Rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Problems in the order in which they were drawn, two or more candidates each; and what cannot be used."""

    problems: dict[str, list[Candidate]]
    rejected: int
    first_reject: str  # "" where there is none
    content: str  # a hash of all of it


def draw_sample(
    pool: Sequence[str], renderer: Renderer, *, problems: int, candidates: int, seed: int, where: Sequence[str] = ()
) -> Sample:
    """Read the pool twice: to see which problems there are, and for the records of those drawn.

    Raises:
        UserError: no problem has two candidates that can be used, or a condition holds for none.
    """
    conditions = [Condition(text) for text in where]
    counts: dict[str, int] = defaultdict(int)
    for item in _read(pool, "looking for problems", conditions):
        if isinstance(item, Record):
            counts[item.key[0]] += 1
    for condition in conditions:
        condition.refuse_unmet()
    several = [problem for problem, count in counts.items() if count > 1]
    drawn = sorted(several, key=lambda problem: draw(seed, problem))[:problems]
    records: dict[str, dict[str, Record]] = {problem: {} for problem in drawn}
    faults = Faults()
    for item in _read(pool, "reading problems", conditions):
        if isinstance(item, Rejected):
            faults.add(item.source, item.line, item.reason)
        elif item.key[0] in records:
            records[item.key[0]].setdefault(item.key[1], item)
    found: dict[str, list[Candidate]] = {}
    for problem, own in records.items():
        usable = []
        for name in sorted(own, key=lambda name, problem=problem: draw(seed, problem, name)):
            if len(usable) == candidates:
                break
            try:
                usable.append(Candidate(record=own[name], rendered=renderer(own[name])))
            except RejectError as error:
                faults.add(own[name].source, own[name].line, str(error))
        if len(usable) > 1:
            found[problem] = sorted(usable, key=lambda candidate: candidate.record.ordinal)
    if not found:
        raise UserError(f"--pool {' '.join(pool)}: no problem has two candidates to compare{faults.told()}")
    tokens = (
        str((problem, one.record.key[1], one.rendered.input_ids, one.rendered.labels)).encode("utf-8", "surrogatepass")
        for problem, own in found.items()
        for one in own
    )
    return Sample(
        problems=found,
        rejected=faults.count,
        first_reject=faults.first,
        content=hash_fields(*tokens, size=16).hex(),
    )


def _read(pool: Sequence[str], doing: str, conditions: Sequence[Condition]) -> Iterator[Record | Rejected]:
    """Of the records, those for which all conditions hold."""
    opened = Pool(pool)
    with track(doing, opened.total_bytes) as progress:
        for item in opened.read():
            progress.update(opened.bytes_read)
            # Every condition is asked, so that each knows whether it ever holds.
            if isinstance(item, Rejected) or all([condition.holds(item) for condition in conditions]):
                yield item
