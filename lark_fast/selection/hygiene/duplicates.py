"""Candidates of one problem that say the same, or almost: of each cluster one stays."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.hashing import hash_fields
from lark_fast.pool.records import Record
from lark_fast.selection.blocks import same_size
from lark_fast.selection.hygiene.removals import Removal
from lark_fast.selection.hygiene.texts import WordHashes, answer_turns, run_hashes, words

DEFAULT_THRESHOLD = 0.8
SHINGLE_WORDS = 5
PERMUTATIONS = 128
_SEED = 1
_SLOT = np.dtype(np.uint16)  # of a 32-bit minimum: unequal ones agree in 16 bits once in 65,536 times
_SIGNATURE_BYTES = PERMUTATIONS * _SLOT.itemsize
_BLOCK_ROWS = 1 << 16
_BUFFER_BYTES = 1 << 20


class _Seen:
    """When each row was seen and where its record lies: 12 bytes a row."""

    def __init__(self, size: int) -> None:
        self.order = np.zeros(size, dtype=np.uint32)  # from 1 in the order of the pool, 0 for rows not seen
        self.count = 0
        self._source = np.zeros(size, dtype=np.uint32)
        self._line = np.zeros(size, dtype=np.uint32)
        self._sources: dict[str, int] = {}

    def add(self, row: int, record: Record) -> None:
        if self.order[row]:
            raise ValueError(f"row {row} was seen before")
        self.count += 1
        self.order[row] = self.count
        self._source[row] = self._sources.setdefault(record.source, len(self._sources))
        self._line[row] = record.line

    def rows(self, gone: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        """The rows that were seen and are not gone."""
        return np.flatnonzero(self.order if gone is None else (self.order > 0) & ~gone)

    def removals(
        self, name: str, row: NDArray[Any], of_row: NDArray[Any], similarity: NDArray[Any]
    ) -> Iterator[Removal]:
        """A removal an entry of the arrays, in the order of the pool."""
        sources = list(self._sources)
        for place in np.argsort(self.order[row], kind="stable"):
            stays = int(of_row[place])
            yield Removal(
                row=int(row[place]),
                reason=name,
                of_row=stays,
                matched=f"{sources[self._source[stays]]}:{self._line[stays]}",
                similarity=float(similarity[place]),
            )


class ExactDuplicates:
    """Filter: answers of one problem that are equal but for white space, case and Unicode's compatible forms.

    Holds 20 bytes a row. A text is known by 64 bits, its problem included: among 10^7 two unequal ones are taken for
    equal with a chance of 10^-5.

    Args:
        size: rows of the scores.
        keep: ``[R]`` the lowest of a cluster stays, NaN being the highest; among equals, and without it, the first
            of the pool does.
    """

    name = "--near-duplicates exact"

    def __init__(self, size: int, keep: NDArray[np.floating] | None = None) -> None:
        self._keep, self._seen = _checked_keep(keep, size), _Seen(size)
        self._text = np.zeros(size, dtype=np.uint64)

    def see(self, row: int, problem: int, record: Record) -> None:
        """Take note of the record that made this row of the scores."""
        self._seen.add(row, record)
        fields = [field.encode() for turn in answer_turns(record) for field in turn]
        digest = hash_fields(int(problem).to_bytes(8, "little"), *fields, size=8)
        self._text[row] = int.from_bytes(digest, "little")

    def removals(self, gone: NDArray[np.bool_] | None = None) -> Iterator[Removal]:
        """What is to go, in the order of the pool. Rows that are ``gone`` (``[R]``) already take no part."""
        rows = _by_preference(self._seen, self._keep, self._text, gone)
        text = self._text[rows]
        is_first = np.concatenate(([True], text[1:] != text[:-1])) if len(rows) else np.empty(0, dtype=bool)
        stays = rows[np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))]
        removed = ~is_first
        yield from self._seen.removals(self.name, rows[removed], stays[removed], np.ones(np.count_nonzero(removed)))

    def notes(self) -> list[str]:
        """Nothing."""
        return []

    def close(self) -> None:
        """Nothing is open."""


class NearDuplicates:
    """Filter: answers of one problem that share most of their runs of five words, judged by MinHash.

    A. Z. Broder, "On the resemblance and containment of documents" (1997): the share of permutations under which two
    sets have one minimum estimates their Jaccard similarity J with a standard deviation of sqrt(J (1 - J) / 128), which
    is 0.035 at 0.8. Nothing but these estimates is looked at: the texts are not kept. From the most preferred candidate
    to the least, one that is as similar as ``threshold`` to any that stays has to go; so no two that stay are.

    Holds 16 bytes a row in memory and 256 in a temporary file that no one else can see. All pairs of a problem are
    compared: K candidates take K^2 / 2 comparisons.

    Args:
        size: rows of the scores.
        threshold: estimated Jaccard similarity, above 0, at most 1.
        keep: as in ``ExactDuplicates``.
        directory: where the temporary file lies; default: where the system has its own.

    Raises:
        ValueError: threshold out of range, ``keep`` of another length.
        UserError: the package rensa is missing, or the temporary file cannot be written.
    """

    name = "--near-duplicates minhash"

    def __init__(
        self,
        size: int,
        threshold: float = DEFAULT_THRESHOLD,
        keep: NDArray[np.floating] | None = None,
        directory: str | Path | None = None,
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold}: must be above 0 and at most 1")
        try:
            from rensa import RMinHash
        except ImportError:
            raise UserError(f"{self.name}: needs the package rensa; pip install 'lark-fast[hygiene]'") from None
        self._digests = RMinHash.digest_matrix_from_flat_token_hashes
        # A float such as 0.7 * 10 lies a hair above its whole number.
        self._needed = int(np.ceil(threshold * PERMUTATIONS - 1e-9))
        self._keep, self._seen = _checked_keep(keep, size), _Seen(size)
        self._problem = np.zeros(size, dtype=np.int32)
        self._hashes = WordHashes()
        self._directory = tempfile.gettempdir() if directory is None else directory
        try:
            # It has no name, so that whatever ends the program also frees the disk.
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=_BUFFER_BYTES)  # noqa: SIM115
        except OSError as error:
            raise self._cannot_write(error) from error

    def see(self, row: int, problem: int, record: Record) -> None:
        """Take note of the record that made this row of the scores.

        Raises:
            UserError: the temporary file cannot be written.
        """
        self._seen.add(row, record)
        self._problem[row] = problem
        found = [word for _, text in answer_turns(record) for word in words(text)]
        hashes = self._hashes(found)
        shingles = run_hashes(hashes, min(SHINGLE_WORDS, max(len(hashes), 1)))
        matrix = self._digests(shingles, np.array([0, len(shingles)], dtype=np.uint64), PERMUTATIONS, _SEED)
        signature = np.array(matrix.to_rows()[0], dtype=np.uint32).astype(_SLOT)
        try:
            self._file.write(signature.tobytes())
        except OSError as error:
            raise self._cannot_write(error) from error

    def removals(self, gone: NDArray[np.bool_] | None = None) -> Iterator[Removal]:
        """What is to go, in the order of the pool. Rows that are ``gone`` (``[R]``) already take no part.

        Raises:
            UserError: the temporary file cannot be written.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error
        rows = _by_preference(self._seen, self._keep, self._problem, gone)
        found: list[tuple[NDArray[Any], ...]] = []
        for block in _same_size_blocks(rows, self._problem[rows]):
            of, agreeing = _greedy(self._signatures(block), self._needed)
            removed = of >= 0
            of_row = np.take_along_axis(block, np.maximum(of, 0), axis=1)[removed]
            found.append((block[removed], of_row, agreeing[removed] / PERMUTATIONS))
        if found:
            yield from self._seen.removals(self.name, *map(np.concatenate, zip(*found, strict=True)))

    def notes(self) -> list[str]:
        """Nothing."""
        return []

    def close(self) -> None:
        """Free the temporary file."""
        self._file.close()

    def _signatures(self, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        """``[P, N, K]`` the signatures of rows ``[N, K]``."""
        slots = self._seen.order[rows.ravel()].astype(np.int64) - 1
        in_file = np.argsort(slots, kind="stable")
        read = np.empty((len(slots), PERMUTATIONS), dtype=_SLOT)
        # Neighbours are read together; a memory map would count every page that it touches as the program's memory.
        starts = np.flatnonzero(np.diff(slots[in_file], prepend=-2) != 1)
        for first, end in zip(starts, np.append(starts[1:], len(slots)), strict=True):
            _read_at(self._file.fileno(), read[first:end], int(slots[in_file[first]]) * _SIGNATURE_BYTES)
        signatures = np.empty((PERMUTATIONS, len(slots)), dtype=_SLOT)
        signatures[:, in_file] = read.T
        return signatures.reshape(PERMUTATIONS, *rows.shape)

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"{self.name}: the temporary file in {self._directory} cannot be written: {error.strerror or error}; "
            f"it takes {_SIGNATURE_BYTES} bytes a trajectory"
        )


def _checked_keep(keep: NDArray[np.floating] | None, size: int) -> NDArray[np.floating] | None:
    if keep is not None and keep.shape != (size,):
        raise ValueError(f"keep has shape {keep.shape}, the scores have {size} rows")
    return keep


def _by_preference(
    seen: _Seen, keep: NDArray[np.floating] | None, group: NDArray[Any], gone: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """The rows that take part, those of a group together, the most preferred of each group first."""
    rows = seen.rows(gone)
    preferences = [seen.order[rows]] if keep is None else [seen.order[rows], keep[rows]]
    return rows[np.lexsort((*preferences, group[rows]))]


def _same_size_blocks(rows: NDArray[np.int64], problem: NDArray[np.int32]) -> Iterator[NDArray[np.int64]]:
    """The rows of problems of one size as matrices ``[N, K]``, K > 1, of about 65,000 cells at most."""
    starts = np.flatnonzero(np.concatenate(([True], problem[1:] != problem[:-1]))) if len(rows) else np.empty(0, int)
    sizes = np.diff(np.append(starts, len(rows)))
    several = sizes > 1
    for _, cells in same_size(starts[several], sizes[several], _BLOCK_ROWS):
        yield rows[cells]


def _greedy(signatures: NDArray[np.uint16], needed: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Who stays, by preference.

    Args:
        signatures: ``[P, N, K]``, the most preferred candidate of each problem first.
        needed: permutations that have to agree.

    Returns:
        ``[N, K]`` the position of the candidate that stays in the place of each, -1 for those that stay themselves;
        ``[N, K]`` how many permutations agree with that one's.
    """
    _, n, k = signatures.shape
    of = np.full((n, k), -1, dtype=np.int64)
    agreeing = np.zeros((n, k), dtype=np.uint8)
    for leader in range(k - 1):
        stays = of[:, leader] < 0
        if not stays.any():
            continue
        equal = signatures[:, :, leader + 1 :] == signatures[:, :, leader, None]
        agree = np.add.reduce(equal.view(np.uint8), axis=0, dtype=np.uint8)
        goes = stays[:, None] & (of[:, leader + 1 :] < 0) & (agree >= needed)
        of[:, leader + 1 :][goes] = leader
        agreeing[:, leader + 1 :][goes] = agree[goes]
    return of, agreeing


def _read_at(descriptor: int, into: NDArray[np.uint16], offset: int) -> None:
    """Fill a contiguous array from a file."""
    rest = memoryview(into).cast("B")
    while rest:
        size = os.preadv(descriptor, [rest], offset)
        if not size:
            raise EOFError(f"the temporary file ends at {offset}")
        rest, offset = rest[size:], offset + size
