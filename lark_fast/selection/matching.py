"""The pool streams past, and every record that was scored is met with its row of the scores."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lark_fast.errors import UserError
from lark_fast.pool.keys import KeyTable
from lark_fast.pool.reading import Pool, Rejected
from lark_fast.pool.records import Record
from lark_fast.progress import track
from lark_fast.selection.scored_rows import ScoredRows, key_hash

_RECORDS_AN_UPDATE = 256


class RowIndex:
    """From a record to the row that it made: 36 bytes a row.

    Keys are kept as 64-bit hashes: among 10^7 trajectories two share one with a chance of 10^-5, which is noticed.

    Raises:
        UserError: two rows have one key, or ``rejected.jsonl`` cannot be read.
    """

    def __init__(self, rows: ScoredRows) -> None:
        self.rows = rows
        self._contents = rows.contents()
        self._order = np.argsort(rows.keys).astype(np.int32 if len(rows) < 2**31 else np.int64)
        self._sorted_keys = rows.keys[self._order]
        twice = np.flatnonzero(self._sorted_keys[1:] == self._sorted_keys[:-1])
        if len(twice):
            name, candidate, _ = rows.locate(int(self._order[twice[0]]))
            raise UserError(
                f"{rows.directory}: problem {name!r}, candidate {candidate!r} is there twice; "
                "score into another directory"
            )
        self.rejects = _logged_rejects(rows.directory)

    def find(self, key: tuple[str, str]) -> int | None:
        """The row of the trajectory with this key, None when it was not scored."""
        wanted = np.uint64(key_hash(key))
        place = self._sorted_keys.searchsorted(wanted)
        if place < len(self.rows) and self._sorted_keys[place] == wanted:
            return int(self._order[place])
        return None

    def has_content(self, row: int, content_hash: bytes) -> bool:
        """Whether the row was made from a record with this content."""
        return self._contents[row].tobytes() == content_hash


class Matching:
    """One pass over the pool, in its order: each scored record once, with its row.

    Attributes:
        records: read from the pool.
        never_scored: records that are neither in the scores nor in rejected.jsonl.
        duplicates: records whose key came before.
    """

    def __init__(self, index: RowIndex) -> None:
        self._index, self._rows = index, index.rows
        self._met = np.zeros(len(index.rows), dtype=bool)
        self.records = self.never_scored = self.duplicates = self._changed = 0
        self._first_changed = ""

    def pairs(self, pool: Pool, label: str) -> Iterator[tuple[int, Record]]:
        """Yield (row, record); ``label`` is what the progress bar says."""
        with track(label, pool.total_bytes) as progress:
            for item in pool.read():
                self.records += 1
                row = self._row(item)
                if row is not None:
                    yield row, item
                if self.records % _RECORDS_AN_UPDATE == 0:
                    progress.update(pool.bytes_read, f"{self.records:,} records")
            progress.update(pool.bytes_read, f"{self.records:,} records")

    def refuse_another_pool(self) -> None:
        """UserError when a scored trajectory was not met, or not with the text that was scored."""
        missing, scores = np.flatnonzero(~self._met), self._rows.directory
        if len(missing):
            problem, candidate, source = self._rows.locate(int(missing[0]))
            raise UserError(
                f"--pool: lacks {len(missing):,} of the {len(self._rows):,} trajectories in {scores}, first of all "
                f"problem {problem!r}, candidate {candidate!r} of {source}; give every --pool that was scored"
            )
        if self._changed:
            raise UserError(
                f"{self._first_changed}: not the text that was scored ({self._changed:,} of {len(self._rows):,} "
                f"trajectories in {scores} have changed); give the pool that was scored, in the same order"
            )

    def _row(self, item: Record | Rejected) -> int | None:
        """The row of the scores that this very record made, if it made one."""
        row = None if isinstance(item, Rejected) else self._index.find(item.key)
        if row is None:
            self.never_scored += not self._was_rejected(item)
        elif self._met[row]:
            self.duplicates += 1
        elif self._index.has_content(row, item.content_hash()):
            self._met[row] = True
            return row
        elif not self._was_rejected(item):
            self._met[row] = True
            self._changed += 1
            problem, candidate = item.key
            self._first_changed = self._first_changed or (
                f"{item.source}:{item.line}: problem {problem!r}, candidate {candidate!r}"
            )
        return None

    def _was_rejected(self, item: Record | Rejected) -> bool:
        return self._index.rejects.find((item.source, str(item.line))) is not None


def _logged_rejects(scores: Path) -> KeyTable:
    """The (source, line) of every record that scoring rejected."""
    rejects = KeyTable()
    path = scores / "rejected.jsonl"
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                rejects.add((entry["source"], str(entry["line"])), b"", met=False)
    except FileNotFoundError:
        return rejects
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return rejects
