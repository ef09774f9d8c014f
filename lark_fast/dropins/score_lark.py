"""LARK's released ``score_lark``: its input, its numbers, its JSON; scored by ``lark-fast score``.

The scores directory stands beside the JSON, so a run that was stopped goes on and a pool that has grown is not scored
anew. The JSON then takes the input's order and the ids as they stand there.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from lark_fast.errors import UserError
from lark_fast.files import refuse_overlap, writing_to
from lark_fast.pool.reading import Pool, RawRecord
from lark_fast.pool.records import Record
from lark_fast.scoring.export import write_lark_json
from lark_fast.scoring.learnability import g_hat, rho
from lark_fast.scoring.parts import part_files, reading
from lark_fast.scoring.run import ScoreConfig, score_pool
from lark_fast.scoring.summary import ScoreSummary

Key = tuple[str, str]


def scores_beside(output: str) -> str:
    """The scores directory of a JSON file."""
    return f"{output}.scores"


def score_lark(config: ScoreConfig, output: str) -> ScoreSummary | None:
    """Score a pool and write the released scorer's JSON, which appears whole or not at all.

    Args:
        config: with a ``top_k``, and with ``scores_beside(output)`` as its ``out``.
        output: the file to write, or to replace.

    Returns:
        What came of the scoring. None on every rank but the first, which writes the file, see ``score_pool``.

    Raises:
        UserError: bad input; there is no record in it; ``output`` cannot be written. What was scored is kept.
        KeyboardInterrupt: as above.
    """
    pool = Pool(config.pool)
    refuse_overlap(output, {"--pool": pool.inputs})
    if Path(output).is_dir():
        raise UserError(f"--out {output}: is a directory; name the file to write")
    with closing(pool.read_raw(1)) as records:
        if next(records, None) is None:
            raise UserError(f"--pool {' '.join(config.pool)}: holds no record")
    summary = score_pool(config)
    if summary is None:
        return None
    table = _table(pool, config.limit, _stored(config.out))
    with writing_to(output):
        write_lark_json(
            output,
            student=config.student,
            top_k=config.top_k,
            problems=table.problems(),
            scored=len(table.rows),
            skipped=table.skipped,
        )
    return summary


class _Stored(NamedTuple):
    """What the scores directory knows about one record."""

    content_hash: bytes
    nll: float
    brier: float


@dataclass(slots=True)
class _Table:
    """The rows of the JSON in the input's order; memory grows with the pool, as the released scorer's does."""

    names: list[str] = field(default_factory=list)  # of each row's problem
    rows: list[dict[str, Any]] = field(default_factory=list)
    own_ids: dict[str, int | str] = field(default_factory=dict)  # a problem's id by its name, as the input has it
    sizes: dict[str, int] = field(default_factory=dict)
    skipped: int = 0

    def add(self, record: Record, has_id: bool, scored: _Stored) -> None:
        """Take in a record; without a candidate_id it is numbered among those scored of its problem."""
        problem = str(record.problem_id)
        self.own_ids.setdefault(problem, record.problem_id)
        number = self.sizes.get(problem, 0)
        self.sizes[problem] = number + 1
        candidate = record.candidate_id if has_id else number
        row = {"candidate_id": candidate, "teacher": record.teacher, "L": scored.nll, "Brier": scored.brier}
        self.names.append(problem)
        self.rows.append(row)

    def problems(self) -> dict[str, list[dict[str, Any]]]:
        """All rows with their rho and g_hat by problem, numbers before names, each in its own order."""
        nll, brier = (np.array([row[name] for row in self.rows], dtype=np.float64) for name in ("L", "Brier"))
        numbers = {problem: number for number, problem in enumerate(self.own_ids)}
        scores = g_hat(nll, brier, [numbers[name] for name in self.names])
        problems: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted(self.own_ids, key=self._order)}
        for problem, row, *made in zip(self.names, self.rows, rho(nll, brier).tolist(), scores.tolist(), strict=True):
            problems[problem].append(row | dict(zip(("rho", "g_hat"), made, strict=True)))
        return problems

    def _order(self, problem: str) -> tuple[bool, int | str]:
        own = self.own_ids[problem]
        return isinstance(own, str), own


def _stored(directory: str) -> dict[Key, _Stored]:
    rows = {}
    for part in part_files(directory):
        with reading(part):
            table = pq.read_table(part, columns=["problem_id", "candidate_id", "content_hash", "nll", "brier_topk"])
        for problem, candidate, *numbers in zip(*table.to_pydict().values(), strict=True):
            rows[problem, candidate] = _Stored(*numbers)
    return rows


def _table(pool: Pool, limit: int | None, stored: dict[Key, _Stored]) -> _Table:
    table = _Table()
    for raw, record in _records(pool, limit):
        found = stored.get(record.key) if isinstance(record, Record) else None
        if found is None or found.content_hash != record.content_hash():
            table.skipped += 1
            continue
        del stored[record.key]  # a second record of that name was not scored
        # The pool's default is the ordinal; only an id that is equal to it can be one.
        table.add(record, record.candidate_id != record.ordinal or _has_candidate_id(raw), found)
    return table


def _records(pool: Pool, limit: int | None) -> Iterator[tuple[RawRecord, Any]]:
    for raw in pool.read_raw(limit):
        yield raw, raw.parse()


def _has_candidate_id(raw: RawRecord) -> bool:
    columns = json.loads(raw.content.decode("utf-8-sig")) if isinstance(raw.content, bytes) else raw.content
    return "candidate_id" in columns
