"""The scores as compact arrays, a row a trajectory, with a way from a record's key to its row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.hashing import hash_fields
from lark_fast.scoring.store import part_files

_BATCH_ROWS = 1 << 13
_BLOCK_CELLS = 1 << 17


class ScoredRows:
    """The rows of a finished scores directory, in its order.

    Keys are kept as 64-bit hashes: among 10^7 trajectories two share one with a chance of 10^-5, which is noticed.

    Attributes:
        problem: ``[R]`` numbers from 0 to the number of problems; ``problem_name(n)`` is the id as a string.
        teacher: ``[R]`` positions in ``teachers``.
        numbers: ``[R]`` float64 for each column asked for.
        n_tokens: ``[R]`` scored tokens.
        keys: ``[R]`` hashes of (problem_id, candidate_id).

    Raises:
        UserError: a part cannot be read or lacks a column, there are no rows, or two have one key.
    """

    def __init__(self, directory: str | Path, columns: tuple[str, ...]) -> None:
        self.directory = Path(directory)
        names = ("problem_id", "teacher", "n_tokens", *columns, "content_hash")
        problem, teacher, keys, contents = [], [], [], []
        numbers: dict[str, list[NDArray[Any]]] = {name: [] for name in ("n_tokens", *columns)}
        for batch in self._batches(("candidate_id", *names)):
            problem.append(batch["problem_id"])
            teacher.append(batch["teacher"])
            pairs = zip(batch["problem_id"].to_pylist(), batch["candidate_id"].to_pylist(), strict=True)
            keys.append(np.fromiter(map(_key_hash, pairs), dtype=np.uint64, count=len(batch)))
            contents.append(np.array(batch["content_hash"].to_pylist(), dtype="V16"))
            for name, arrays in numbers.items():
                arrays.append(batch[name].to_numpy(zero_copy_only=False))
        if not any(map(len, keys)):
            raise UserError(f"{directory}: holds no scored trajectories")
        self.problem, self._problem_names = _codes(problem)
        self.teacher, teachers = _codes(teacher)
        self.teachers: list[str] = teachers.to_pylist()
        self.n_tokens = np.concatenate(numbers.pop("n_tokens")).astype(np.int64)
        self.numbers = {name: np.concatenate(arrays).astype(np.float64) for name, arrays in numbers.items()}
        self.keys = np.concatenate(keys)
        self._contents = np.concatenate(contents)
        self._order = np.argsort(self.keys)
        self._sorted_keys = self.keys[self._order]
        twice = np.flatnonzero(self._sorted_keys[1:] == self._sorted_keys[:-1])
        if len(twice):
            name, candidate, _ = self.locate(int(self._order[twice[0]]))
            raise UserError(
                f"{directory}: problem {name!r}, candidate {candidate!r} is there twice; score into another directory"
            )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def n_problems(self) -> int:
        """How many problems there are."""
        return len(self._problem_names)

    def problem_name(self, problem: int) -> str:
        """The problem's id as a string."""
        return self._problem_names[problem].as_py()

    def find(self, key: tuple[str, str]) -> int | None:
        """The row of the trajectory with this key, None when it was not scored."""
        wanted = np.uint64(_key_hash(key))
        place = self._sorted_keys.searchsorted(wanted)
        if place < len(self) and self._sorted_keys[place] == wanted:
            return int(self._order[place])
        return None

    def has_content(self, row: int, content_hash: bytes) -> bool:
        """Whether the row was made from a record with this content."""
        return self._contents[row].tobytes() == content_hash

    def locate(self, row: int) -> tuple[str, str, str]:
        """(problem_id, candidate_id, source) of a row, read from the disk again: for messages."""
        names, start = ("problem_id", "candidate_id", "source"), 0
        for batch in self._batches(names):
            if row < start + len(batch):
                return tuple(batch[name][row - start].as_py() for name in names)
            start += len(batch)
        raise IndexError(row)

    def padded_blocks(self) -> Iterator[NDArray[np.int64]]:
        """The rows of all problems as matrices ``[N, K]`` of row numbers, a problem a line, padded with -1.

        Problems of similar size go together and a matrix holds about 130,000 cells, so that one problem with
        thousands of candidates costs no more than itself.
        """
        order = np.argsort(self.problem, kind="stable")
        sizes = np.bincount(self.problem, minlength=self.n_problems)
        starts = np.cumsum(sizes) - sizes
        by_size = np.argsort(-sizes, kind="stable")
        first = 0
        while first < len(by_size):
            width = sizes[by_size[first]]
            members = by_size[first : first + max(1, _BLOCK_CELLS // width)]
            column = np.arange(width)
            place = np.minimum(starts[members, None] + column, len(order) - 1)
            yield np.where(column < sizes[members, None], order[place], -1)
            first += len(members)

    def _batches(self, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
        for part in part_files(self.directory):
            try:
                # The few distinct strings of these columns stay in Parquet's dictionaries instead of a copy a row.
                file = pq.ParquetFile(part, read_dictionary=["problem_id", "teacher"])
                lacking = [name for name in columns if name not in file.schema_arrow.names]
                if lacking:
                    raise UserError(f"{part}: has no column {lacking[0]}; run the same `lark-fast score` command again")
                yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns))
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{part}: cannot be read: {error}") from error


def _key_hash(key: tuple[str, str]) -> int:
    return int.from_bytes(hash_fields(key[0].encode(), key[1].encode(), size=8), "little")


def _codes(chunks: list[pa.DictionaryArray]) -> tuple[NDArray[np.int32], pa.Array]:
    """Every value's position among the distinct ones, and these."""
    unified = pa.chunked_array(chunks).unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in unified.chunks])
    return codes.astype(np.int32), unified.chunk(unified.num_chunks - 1).dictionary
