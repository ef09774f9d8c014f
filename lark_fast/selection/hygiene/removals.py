"""What a filter says of a record that has to go, and the line of removed.jsonl that tells of it."""

from dataclasses import dataclass
from typing import Any

from lark_fast.pool.records import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """One row of the scores that a filter takes out."""

    row: int
    reason: str  # the filter, as the command line names it
    of_row: int | None = None  # the row that stays in its place
    matched: str | None = None  # where that one lies in the pool, or the item of the benchmark and the words it shares
    similarity: float | None = None  # Jaccard: 1 when the texts are equal, else an estimate


def removed_entry(record: Record, removal: Removal) -> dict[str, Any]:
    """The line of ``removed.jsonl`` for the record that made the removed row."""
    return {
        "problem_id": record.problem_id,
        "candidate_id": record.candidate_id,
        "source": record.source,
        "line": record.line,
        "reason": removal.reason,
        "matched": removal.matched,
        "similarity": removal.similarity,
    }
