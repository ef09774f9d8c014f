"""The scores directory: Parquet parts that appear whole, a manifest, and a finishing step that adds rho and g_hat.

    scores/part-000000.parquet ...   one row a trajectory, in the order of the pool
    scores/manifest.json             student, config, counts, timing; "complete" once every row has its g_hat
    scores/rejected.jsonl            {source, line, reason}

Parts are only ever replaced by rename, so at any moment the directory holds exactly the windows that were finished.
"""

import json
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark_fast.errors import UserError
from lark_fast.files import TEMPORARY_SUFFIX, atomic_path, write_json, writing_to
from lark_fast.scoring.learnability import g_hat, rho

FORMAT = 1
GROUP_ROWS = 1_000_000  # rows whose problems are grouped in memory at a time
LARK_JSON = "lark_ghat.json"  # of ``export``; stale once the store changes
STATISTICS = ("nll", "brier", "brier_topk", "entropy", "rank_mean", "rsr")
PER_TOKEN = {
    "token_nll": pa.float32(),
    "token_brier": pa.float32(),
    "token_brier_topk": pa.float32(),
    "token_entropy": pa.float32(),
    "token_rank": pa.int32(),
}


def schema(*, top_k: int | None, per_token: bool = False, final: bool = False) -> pa.Schema:
    """Columns of a part, raw or final."""
    statistics = [name for name in STATISTICS if name != "brier_topk" or top_k is not None]
    tokens = [name for name in PER_TOKEN if per_token and (name != "token_brier_topk" or top_k is not None)]
    derived = ["rho", "g_hat"] if final else []
    return pa.schema(
        [
            ("problem_id", pa.string()),
            ("candidate_id", pa.string()),
            ("teacher", pa.string()),
            ("source", pa.string()),
            ("n_tokens", pa.int32()),
            ("n_input_tokens", pa.int32()),
            ("truncated", pa.bool_()),
            *[(name, pa.float64()) for name in (*statistics, *derived)],
            ("content_hash", pa.binary(16)),
            ("token_hash", pa.binary(16)),
            *[(name, pa.list_(PER_TOKEN[name])) for name in tokens],
        ]
    )


class ScoreStore:
    """One scores directory.

    Args:
        directory: where it is; made when it does not exist.
        identity: everything that decides the numbers (student, dtype, rendering, ...). A directory that was begun with
            another identity is refused.
        overwrite: throw away what is there.

    Raises:
        UserError: the directory holds scores of another student or config, or something that is not a score store.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        self.directory, self.identity = Path(directory), identity
        self.manifest: dict[str, Any] = {"complete": False}
        with writing_to(directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.parts():
                # Without a manifest of ours they are somebody else's parts, and nothing of that is thrown away.
                self.manifest = read_manifest(self.directory)
                if overwrite:
                    self._clear()
                else:
                    self._refuse_another_identity(self.manifest["identity"])
            for name in ("part-*.parquet", "manifest.json", "rejected.jsonl", LARK_JSON):
                for leftover in self.directory.glob(name + TEMPORARY_SUFFIX):
                    leftover.unlink()
            if not self.parts():
                self.write_manifest(complete=False)

    @property
    def manifest_path(self) -> Path:
        """Where the manifest is."""
        return self.directory / "manifest.json"

    def parts(self) -> list[Path]:
        """The finished parts, in the order of the pool."""
        return part_files(self.directory)

    def keys(self) -> Iterator[tuple[tuple[str, str], bytes]]:
        """((problem_id, candidate_id), content_hash) of every stored row."""
        for part in self.parts():
            try:
                names = ["problem_id", "candidate_id", "content_hash"]
                for batch in pq.ParquetFile(part).iter_batches(columns=names):
                    problem, candidate, content = (column.to_pylist() for column in batch.columns)
                    yield from zip(zip(problem, candidate, strict=True), content, strict=True)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{part}: cannot be read ({error}); remove it, and it is scored again") from error

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write one part; after this returns, the rows survive anything."""
        if self.manifest["complete"]:
            self.write_manifest(complete=False)
            (self.directory / LARK_JSON).unlink(missing_ok=True)
        parts = self.parts()
        number = int(parts[-1].stem.removeprefix("part-")) + 1 if parts else 0
        columns = schema(top_k=self.identity["top_k"], per_token=self.identity["per_token"])
        self._write(self.directory / f"part-{number:06d}.parquet", pa.Table.from_pylist(list(rows), columns))

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Add rho and g_hat to every row, then call the store complete; returns the manifest."""
        rows, problems, not_finite = self._add_learnability()
        counts = facts.pop("counts", {}) | {"rows": rows, "problems": problems, "not_finite": not_finite}
        return self.write_manifest(complete=True, counts=counts, **facts)

    def write_manifest(self, *, complete: bool, **facts: Any) -> dict[str, Any]:
        """Write manifest.json; ``facts`` are counts, timing, versions."""
        self.manifest = {
            "format": FORMAT,
            "complete": complete,
            "brier": "brier" if self.identity["top_k"] is None else "brier_topk",
            "identity": self.identity,
            **facts,
        }
        write_json(self.manifest_path, self.manifest)
        return self.manifest

    def _add_learnability(self) -> tuple[int, int, int]:
        """Out-of-core group-by: problems are hashed into groups that fit in memory, g_hat waits in a file on disk.

        Returns the numbers of rows, of problems, and of rows without a g_hat.
        """
        parts = self.parts()
        sizes = [pq.read_metadata(part).num_rows for part in parts]
        total = sum(sizes)
        if not total:
            return 0, 0, 0
        groups = 1 + total // GROUP_ROWS
        problems = 0
        origin: dict[int, int] = {}  # row -> the first row of its problem with the same tokens
        with tempfile.TemporaryFile(dir=self.directory) as scratch:
            values = np.memmap(scratch, dtype=np.float64, mode="w+", shape=(total,))
            for group in range(groups):
                rows, problem, tokens, nll, brier = self._read_group(parts, sizes, group, groups)
                problems += len(np.unique(problem))
                first = _first_with_same_tokens(problem, tokens)
                values[rows] = g_hat(nll[first], brier[first], problem)
                moved = np.flatnonzero(first != np.arange(len(first)))
                origin.update(zip(rows[moved].tolist(), rows[first[moved]].tolist(), strict=True))
            self._rewrite(parts, sizes, values, origin)
            not_finite = int(np.count_nonzero(np.isnan(values)))
        return total, problems, not_finite

    def _read_group(self, parts: list[Path], sizes: list[int], group: int, groups: int) -> tuple[np.ndarray, ...]:
        """Row numbers, problem codes, token-hash codes, nll and the Brier score used, of one group's rows."""
        score = "brier" if self.identity["top_k"] is None else "brier_topk"
        names = ["problem_id", "token_hash", "nll", score]
        rows, tables, start = [], [], 0
        for part, size in zip(parts, sizes, strict=True):
            table = pq.read_table(part, columns=names)
            keep = np.arange(size)
            if groups > 1:
                ids = table["problem_id"].combine_chunks().dictionary_encode()
                of_word = np.array([zlib.crc32(word.encode()) % groups for word in ids.dictionary.to_pylist()])
                keep = np.flatnonzero(of_word[ids.indices.to_numpy()] == group)
                table = table.take(keep)
            rows.append(start + keep)
            tables.append(table)
            start += size
        table = pa.concat_tables(tables).combine_chunks()
        codes = [table[name].combine_chunks().dictionary_encode().indices.to_numpy() for name in names[:2]]
        numbers = [table[name].to_numpy() for name in names[2:]]
        return np.concatenate(rows), *codes, *numbers

    def _rewrite(self, parts: list[Path], sizes: list[int], values: np.ndarray, origin: dict[int, int]) -> None:
        """Give every part its final columns. Rows with the tokens of an earlier candidate take that one's numbers."""
        top_k, per_token = self.identity["top_k"], self.identity["per_token"]
        final = schema(top_k=top_k, per_token=per_token, final=True)
        shared = [name for name in STATISTICS if name in final.names]
        wanted = set(origin.values())
        numbers: dict[int, tuple[float, ...]] = {}
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            table = pq.read_table(part)
            columns = {name: table[name].to_numpy().copy() for name in shared}
            here = range(start, start + size)
            for row in sorted((wanted | origin.keys()) & set(here)) if origin else ():
                if row in origin:
                    for name, number in zip(shared, numbers[origin[row]], strict=True):
                        columns[name][row - start] = number
                else:
                    numbers[row] = tuple(columns[name][row - start] for name in shared)
            columns["rho"] = rho(columns["nll"], columns["brier" if top_k is None else "brier_topk"])
            columns["g_hat"] = values[start : start + size]
            made = pa.table(
                [pa.array(columns[n], pa.float64()) if n in columns else table[n] for n in final.names], schema=final
            )
            if not made.equals(table):
                self._write(part, made)
            start += size

    def _write(self, path: Path, table: pa.Table) -> None:
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def _refuse_another_identity(self, stored: dict[str, Any]) -> None:
        differing = [name for name in {**stored, **self.identity} if stored.get(name) != self.identity.get(name)]
        if differing:
            changes = "; ".join(
                f"{name} was {stored.get(name)!r}, is {self.identity.get(name)!r}" for name in differing
            )
            raise UserError(
                f"--out {self.directory}: holds scores made otherwise ({changes}); "
                "give another directory, or --overwrite to throw them away"
            )

    def _clear(self) -> None:
        others = (self.directory / name for name in ("rejected.jsonl", LARK_JSON))
        for file in [*self.parts(), *others, self.manifest_path]:
            file.unlink(missing_ok=True)


def part_files(directory: str | Path) -> list[Path]:
    """The parts of a scores directory, in the order of the pool."""
    return sorted(Path(directory).glob("part-*.parquet"))


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a scores directory.

    Raises:
        UserError: there is none, or it is of another format.
    """
    path = Path(directory) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{directory}: no manifest.json there; is it what `lark-fast score --out` wrote?") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    if not known or not {"identity", "complete", "brier"} <= manifest.keys():
        raise UserError(f"{path}: not a manifest of this version of lark-fast (format {FORMAT})")
    return manifest


def _first_with_same_tokens(problem: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """For each row, the first row of the same problem and token hash."""
    order = np.lexsort((np.arange(len(problem)), tokens, problem))
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (np.diff(problem[order]) != 0) | (np.diff(tokens[order]) != 0)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return first
