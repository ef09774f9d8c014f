"""The scores as compact arrays, a row a trajectory, and the problems as padded blocks of rows."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.hashing import hash_fields
from lark_fast.scoring.store import part_files

_BATCH_ROWS = 1 << 15
_BLOCK_CELLS = 1 << 17
_TEXTS = ("problem_id", "candidate_id", "teacher", "source")
_KEY_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no bit of a problem's hash is lost


class ScoredRows:
    """The rows of a finished scores directory, in its order; 20 bytes a row and 8 more a column asked for.

    Attributes:
        problem: ``[R]`` numbers from 0 to the number of problems; ``problem_name(n)`` is the id as a string.
        teacher: ``[R]`` positions in ``teachers``.
        numbers: ``[R]`` float64 for each column asked for.
        n_tokens: ``[R]`` scored tokens.

    Raises:
        UserError: a part cannot be read or lacks a column, or there are no rows.
    """

    def __init__(self, directory: str | Path, columns: tuple[str, ...]) -> None:
        self.directory = Path(directory)
        self._size = sum(_opened(part).metadata.num_rows for part in part_files(self.directory))
        if not self._size:
            raise UserError(f"{directory}: holds no scored trajectories")
        problem, teacher, start = [], [], 0
        self.n_tokens = np.empty(self._size, dtype=np.int64)
        self.numbers = {name: np.empty(self._size) for name in columns}
        for batch in self.batches("problem_id", "teacher", "n_tokens", *columns):
            problem.append(batch["problem_id"])
            teacher.append(batch["teacher"])
            here = slice(start, start + len(batch))
            for name, array in (("n_tokens", self.n_tokens), *self.numbers.items()):
                array[here] = batch[name].to_numpy(zero_copy_only=False)
            start += len(batch)
        if (self.n_tokens < 0).any():
            raise UserError(f"{directory}: n_tokens is below 0 in {int((self.n_tokens < 0).sum()):,} rows; score again")
        self.problem, self._problem_names = _codes(problem)
        self.teacher, teachers = _codes(teacher)
        self.teachers: list[str] = teachers.to_pylist()

    def __len__(self) -> int:
        return self._size

    @property
    def n_problems(self) -> int:
        """How many problems there are."""
        return len(self._problem_names)

    def problem_name(self, problem: int) -> str:
        """The problem's id as a string."""
        return self._problem_names[problem].as_py()

    @cached_property
    def keys(self) -> NDArray[np.uint64]:
        """``[R]`` hashes of (problem_id, candidate_id), see ``key_hash``; read from the disk when first asked for."""
        of_candidate, start = np.empty(self._size, dtype=np.uint64), 0
        for batch in self.batches("candidate_id"):
            of_candidate[start : start + len(batch)] = _hashes_of_few(batch["candidate_id"])
            start += len(batch)
        return _joined(_hashes(self._problem_names)[self.problem], of_candidate)

    def contents(self) -> NDArray[np.void]:
        """``[R]`` content hashes, 16 bytes each, read from the disk."""
        contents, start = np.empty(self._size, dtype="V16"), 0
        for batch in self.batches("content_hash"):
            contents[start : start + len(batch)] = np.array(batch["content_hash"].to_pylist(), dtype="V16")
            start += len(batch)
        return contents

    def locate(self, row: int) -> tuple[str, str, str]:
        """(problem_id, candidate_id, source) of a row, read from the disk again: for messages."""
        names, start = ("problem_id", "candidate_id", "source"), 0
        for batch in self.batches(*names):
            if row < start + len(batch):
                return tuple(batch[name][row - start].as_py() for name in names)
            start += len(batch)
        raise IndexError(row)

    def padded_blocks(self) -> Iterator[NDArray[np.integer]]:
        """The rows of all problems as matrices ``[N, K]`` of row numbers, a problem a line, padded with -1.

        Problems of similar size go together and a matrix holds about 130,000 cells, so that one problem with
        thousands of candidates costs no more than itself.
        """
        order, sizes, starts, by_size = self._problems
        first = 0
        while first < len(by_size):
            width = sizes[by_size[first]]
            members = by_size[first : first + max(1, _BLOCK_CELLS // width)]
            column = np.arange(width)
            place = np.minimum(starts[members, None] + column, len(order) - 1)
            yield np.where(column < sizes[members, None], order[place], -1)
            first += len(members)

    @cached_property
    def _problems(self) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Rows problem by problem; how many each has; where in these they begin; problems from the largest down."""
        order = np.argsort(self.problem, kind="stable").astype(np.int32 if self._size < 2**31 else np.int64)
        sizes = np.bincount(self.problem, minlength=self.n_problems)
        return order, sizes, np.cumsum(sizes) - sizes, np.argsort(-sizes, kind="stable")

    def batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """These columns from the disk, some thousand rows at a time, in order."""
        for part in part_files(self.directory):
            file = _opened(part)
            for name in columns:
                _check_column(part, file.schema_arrow, name)
            try:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
                    for name in columns:
                        if batch[name].null_count and name not in self.numbers:
                            raise UserError(f"{part}: column {name} has empty values; {_remedy(name)}")
                    yield batch
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{part}: cannot be read: {error}") from error


def _opened(part: Path) -> pq.ParquetFile:
    try:
        # The few distinct strings of these columns stay in Parquet's dictionaries instead of a copy a row.
        texts = [name for name in ("problem_id", "teacher") if name in pq.read_schema(part).names]
        return pq.ParquetFile(part, read_dictionary=texts)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{part}: cannot be read: {error}") from error


def _check_column(part: Path, schema: pa.Schema, name: str) -> None:
    """UserError for a column that is not there or not of its kind."""
    if name not in schema.names:
        raise UserError(f"{part}: has no column {name}; {_remedy(name)}")
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if name in _TEXTS:
        fits = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    elif name == "n_tokens":
        fits = pa.types.is_integer(kind)
    else:
        fits = pa.types.is_floating(kind) or pa.types.is_integer(kind) or name.endswith("_hash")
    if not fits:
        raise UserError(f"{part}: column {name} is {kind}; {_remedy(name)}")


def key_hash(key: tuple[str, str]) -> int:
    """64 bits for (problem_id, candidate_id), from 64 of each."""
    problem, candidate = map(_hash, key)
    return (problem * _KEY_FACTOR + candidate) % 2**64


def key_hashes(problem: pa.Array, candidate: pa.Array) -> NDArray[np.uint64]:
    """``key_hash`` of many: ``[R]`` for two arrays of R strings."""
    return _joined(_hashes_of_few(problem), _hashes_of_few(candidate))


def _joined(of_problem: NDArray[np.uint64], of_candidate: NDArray[np.uint64]) -> NDArray[np.uint64]:
    of_problem *= np.uint64(_KEY_FACTOR)
    of_problem += of_candidate
    return of_problem


def _hashes_of_few(texts: pa.Array) -> NDArray[np.uint64]:
    """Most pools number their candidates: few distinct names, each hashed once."""
    names = texts.dictionary_encode()
    return _hashes(names.dictionary)[names.indices.to_numpy()]


def _hash(text: str) -> int:
    return int.from_bytes(hash_fields(text.encode(), size=8), "little")


def _hashes(texts: pa.Array) -> NDArray[np.uint64]:
    return np.fromiter(map(_hash, texts.to_pylist()), dtype=np.uint64, count=len(texts))


def _remedy(column: str) -> str:
    asks = {
        "brier_topk": " with --top-k",
        "local_step_nll": " with --local-steps, into another directory",
        "rho_measured": " with --before and --after in place of --student, into another directory",
    }
    return f"run the same `lark-fast score` command again{asks.get(column, '')}"


def _codes(chunks: list[pa.DictionaryArray]) -> tuple[NDArray[np.int32], pa.Array]:
    """Every value's position among the distinct ones, and these."""
    unified = pa.chunked_array(chunks).unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in unified.chunks])
    return codes.astype(np.int32), unified.chunk(unified.num_chunks - 1).dictionary
