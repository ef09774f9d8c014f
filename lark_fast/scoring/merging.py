"""The stores of a pool's shares become one, the same as one run over the whole pool would have left.

A share's rows know their ordinals, their places in the pool. Sorted by them they are in the order in which one run
writes, and of records with one key the first stays, which is the one that run would have met first. In memory are
60 bytes a row, a part of each share and the part that is being written.

    OUT/.merging/   the new store until it is whole; then its files move to OUT, the manifest last
"""

import heapq
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.files import atomic_open, fsync_directory, writing_to
from lark_fast.hashing import hash_fields
from lark_fast.lock import DirectoryLock
from lark_fast.pool.faults import duplicate
from lark_fast.pool.shares import Share
from lark_fast.progress import track
from lark_fast.scoring.export import export_lark_json
from lark_fast.scoring.parts import (
    is_sampled,
    number_of_rows,
    part_files,
    part_number,
    part_path,
    reading,
    schema_of,
    write_part,
)
from lark_fast.scoring.store import LARK_JSON, ScoreStore, read_manifest

BUILDING = ".merging"
PART_ROWS, PART_TOKENS = 1 << 16, 1 << 21  # of a part; tokens count where each has statistics
REJECTS, METRICS, MANIFEST = "rejected.jsonl", "metrics.jsonl", "manifest.json"
_OWN = ("part-*.parquet", "journal-*", REJECTS, METRICS, MANIFEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig:
    """What ``lark-fast merge`` was asked to do."""

    shards: tuple[str, ...]
    out: str
    overwrite: bool = False
    export: str | None = None  # "lark-json"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSummary:
    """What came of it."""

    out: str
    shards: int
    again: bool  # it had been done before
    records: int
    rejected: int
    rows: int
    problems: int
    not_finite: int

    def lines(self) -> list[str]:
        """For people."""
        told = "merged before" if self.again else "merged"
        lines = [
            f"{self.out}: {self.rows:,} trajectories of {self.problems:,} problems, {told} from {self.shards} shards"
        ]
        if self.not_finite:
            lines.append(f"{self.not_finite:,} trajectories have no g_hat (statistics that are not finite, or nll 0)")
        if self.rejected:
            where = Path(self.out) / "rejected.jsonl"
            lines.append(f"{self.rejected:,} of {self.records:,} records rejected, listed in {where}")
        return lines


@dataclass(frozen=True, slots=True)
class _Shard:
    """A finished store of a share."""

    directory: Path
    share: Share
    manifest: dict[str, Any]


def merge(config: MergeConfig) -> MergeSummary:
    """Make one store of all shares of a pool; they are only read.

    Stopped at any moment, it begins again, or goes on moving files where all was made. A store that was made of these
    shares stays as it is.

    Raises:
        UserError: they are not all the finished shares of one pool, scored alike; ``out`` holds something else, or
            cannot be written to; a file cannot be read.
    """
    shards = read_shards(config.shards)
    if config.export is not None and is_sampled(shards[0].manifest["identity"]):
        raise UserError(
            f"--export {config.export}: has no place for standard errors, which --head-share makes; leave it"
        )
    out, building, of = Path(config.out), Path(config.out, BUILDING), _hash(shards)
    for shard in shards:
        if out.resolve().is_relative_to(shard.directory.resolve()):
            raise UserError(f"--out {out}: lies in the shard {shard.directory}; give another directory")
    lock = DirectoryLock(out)
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        _is_done(out, of, config.overwrite)  # to a directory that is somebody else's not even a lock is written
        lock.acquire()
        try:
            done = _is_done(out, of, config.overwrite)
            if done:
                shutil.rmtree(building, ignore_errors=True)  # empty: all has moved
            else:
                if not _is_of(building, of):
                    _build(shards, building, of)
                    if _hash(read_shards(config.shards)) != of:
                        raise UserError("a shard was written to while it was merged; run the same command again")
                _move(building, out)
            if config.export == "lark-json":
                export_lark_json(out)
        finally:
            lock.release()
    counts = read_manifest(out)["counts"]
    return MergeSummary(out=config.out, shards=len(shards), again=done, **counts)


def read_shards(directories: Sequence[str]) -> list[_Shard]:
    """All shares of a pool, in their order.

    Raises:
        UserError: one is none, is not finished, is missing or there twice, or they do not belong together.
    """
    found: dict[int, _Shard] = {}
    for directory in directories:
        manifest = read_manifest(directory)
        shard = manifest["identity"].get("shard")
        if shard is None:
            raise UserError(f"{directory}: is no shard; merge takes what `lark-fast score --shard i/n --out` wrote")
        new = _Shard(Path(directory), Share.parse(shard), manifest)
        first = next(iter(found.values()), new)
        if new.share.of != first.share.of:
            raise UserError(
                f"{directory}: is shard {shard}, but {first.directory} is {first.share}: not of one division"
            )
        if new.share.part in found:
            raise UserError(f"shard {shard} is there twice: {found[new.share.part].directory} and {directory}")
        found[new.share.part] = new
    shards = [found[part] for part in sorted(found)]
    of = shards[0].share.of
    missing = [str(part) for part in range(of) if part not in found]
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise UserError(f"of {of} shards, {len(missing)} are missing ({shown}); give all, or score them first")
    for shard in shards:
        _refuse_stranger(shard, shards[0])
    return shards


def _refuse_stranger(shard: _Shard, first: _Shard) -> None:
    if "share" not in shard.manifest:
        command = f"`lark-fast score --shard {shard.share} --out {shard.directory}`"
        raise UserError(f"{shard.directory}: is not finished; run its {command} command again")
    own, others = (
        one.manifest["identity"] | {"shard": None, "steps": one.manifest.get("steps")} for one in (shard, first)
    )
    differing = [name for name in {**others, **own} if others.get(name) != own.get(name)]
    if differing:
        told = "; ".join(f"{name} is {own.get(name)!r}, there {others.get(name)!r}" for name in differing)
        raise UserError(f"{shard.directory}: was scored otherwise than {first.directory} ({told}); score it again")
    if shard.manifest["share"] != first.manifest["share"]:
        own, others = (_pool_in_words(one.manifest["share"]) for one in (shard, first))
        raise UserError(
            f"{shard.directory}: was scored on another pool than {first.directory} ({own}, there {others}); "
            "run the `lark-fast score --shard` command of each shard again, on one and the same pool"
        )


def _pool_in_words(share: Mapping[str, Any]) -> str:
    files = share["pool"]
    return (
        f"{share['records']:,} records in {len(files):,} file(s) of {sum(files.values()):,} bytes, {next(iter(files))}"
    )


def _hash(shards: Sequence[_Shard]) -> str:
    """Tells whether the shards are those that a merge was made of."""
    return hash_fields(*(json.dumps(shard.manifest).encode() for shard in shards), size=16).hex()


def _is_of(directory: Path, of: str) -> bool:
    """Whether a directory holds the whole merge of these shards."""
    if not (directory / MANIFEST).exists():
        return False
    manifest = read_manifest(directory)
    return manifest["complete"] and manifest.get("merged", {}).get("hash") == of


def _is_done(out: Path, of: str, overwrite: bool) -> bool:
    """Whether the directory is that of an earlier merge, all done.

    Raises:
        UserError: it holds something else that would be lost.
    """
    if not (out / MANIFEST).exists() and _is_of(out / BUILDING, of):  # files are on the move
        return False
    if not any(name for pattern in _OWN for name in out.glob(pattern)):
        return False
    read_manifest(out)  # somebody else's files are refused, whatever was asked for
    if overwrite:
        return False
    if not _is_of(out, of):
        raise UserError(f"--out {out}: holds other scores; give another directory, or --overwrite to throw them away")
    return True


def _build(shards: Sequence[_Shard], building: Path, of: str) -> None:
    """Write the whole store."""
    if building.exists():
        shutil.rmtree(building)
    first = shards[0].manifest
    identity = {name: value for name, value in first["identity"].items() if name != "shard"}
    try:
        with ScoreStore(building, identity) as store:
            rows = _Rows(shards)
            kept, lost = _in_order(rows)
            parts = _write_parts(rows, kept, identity, building)
            rejected = _write_rejects(shards, rows, lost, building / REJECTS)
            _write_metrics(shards, building / METRICS)
            store.finish(
                steps=first.get("steps"),
                config=first["config"],
                counts={"records": first["share"]["records"], "rejected": rejected},
                timing=_timing(shards),
                versions=first["versions"],
                merged={"shards": len(shards), "parts": parts, "hash": of},
            )
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)  # a full disk wants its space back
        raise


class _Rows:
    """The rows of all shards on the disk, numbered from 0 shard by shard."""

    def __init__(self, shards: Sequence[_Shard]) -> None:
        self._parts = [(shard, part) for shard in shards for part in part_files(shard.directory)]
        self._starts = np.cumsum([0, *(number_of_rows(part) for _, part in self._parts)])
        self._opened: dict[Share, tuple[tuple[int, list[str]], pa.Table]] = {}  # the last part of each share

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        """These columns of all rows, some thousand at a time."""
        for _, part in self._parts:
            with reading(part):
                yield from pq.ParquetFile(part).iter_batches(columns=names)

    def take(self, rows: NDArray[np.int64], names: list[str]) -> pa.Table:
        """These columns of the rows with these numbers, in their order.

        The rows of a shard are best asked for in their order: then each part is read once.
        """
        of = np.searchsorted(self._starts, rows, side="right") - 1
        tables, places = [], []
        for part in np.unique(of):
            here = np.flatnonzero(of == part)
            tables.append(self._table(part, names).take(rows[here] - self._starts[part]))
            places.append(here)
        return pa.concat_tables(tables).combine_chunks().take(np.argsort(np.concatenate(places)))

    def _table(self, number: int, names: list[str]) -> pa.Table:
        shard, part = self._parts[number]
        known, table = self._opened.get(shard.share, (None, None))
        if known != (number, names):
            with reading(part):
                table = pq.read_table(part, columns=names)
            self._opened[shard.share] = (number, names), table
        return table


def _in_order(rows: _Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows that stay, and those whose key one before them has, both in the order of the pool."""
    ordinal = np.empty(len(rows), dtype=np.int64)
    keys = np.empty((2, len(rows)), dtype=np.uint64)  # 128 bits of hash tell them apart
    start = 0
    for batch in rows.batches(["ordinal", "problem_id", "candidate_id"]):
        here, start = slice(start, start + len(batch)), start + len(batch)
        ordinal[here] = batch["ordinal"].to_numpy()
        names = zip(batch["problem_id"].to_pylist(), batch["candidate_id"].to_pylist(), strict=True)
        digests = b"".join(hash_fields(problem.encode(), candidate.encode(), size=16) for problem, candidate in names)
        keys[:, here] = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2).T
    by_key = np.lexsort((ordinal, *keys))
    again = np.ones(max(len(rows) - 1, 0), dtype=bool)
    for words in keys:
        sorted_words = words[by_key]
        again &= sorted_words[1:] == sorted_words[:-1]
    lost = np.zeros(len(rows), dtype=bool)
    lost[by_key[1:][again]] = True
    del keys, by_key
    order = np.argsort(ordinal)
    return order[~lost[order]], order[lost[order]]


def _write_parts(rows: _Rows, kept: NDArray[np.int64], identity: dict[str, Any], directory: Path) -> int:
    """Write these rows, in their order, as parts of a directory; returns how many parts."""
    names = schema_of(identity).names
    tokens = np.zeros(len(kept), dtype=np.int32)
    if identity["per_token"]:
        tokens = np.concatenate([tokens[:0], *(batch["n_tokens"].to_numpy() for batch in rows.batches(["n_tokens"]))])[
            kept
        ]
    parts = 0
    with track("merging", len(kept)) as progress:
        for parts, part in enumerate(_cut(tokens), 1):
            write_part(part_path(directory, parts - 1), rows.take(kept[part], names))
            progress.update(part.stop, f"{part.stop:,} trajectories")
    return parts


def _cut(tokens: NDArray[np.int32]) -> Iterator[slice]:
    """Parts of PART_ROWS rows, and of fewer where these have more than PART_TOKENS."""
    total, start = np.cumsum(tokens, dtype=np.int64), 0
    while start < len(tokens):
        before = total[start] - tokens[start]
        full = int(np.searchsorted(total, before + PART_TOKENS)) + 1
        end = min(start + PART_ROWS, full, len(tokens))
        yield slice(start, end)
        start = end


def _write_rejects(shards: Sequence[_Shard], rows: _Rows, lost: NDArray[np.int64], path: Path) -> int:
    """The rejects of all shards, and those who are some only beside another shard; returns how many."""
    order = {source: place for place, source in enumerate(shards[0].manifest["share"]["pool"])}
    logs = [_entries(shard.directory / REJECTS) for shard in shards]
    count = 0
    with atomic_open(path) as file:
        # Each log is in the order of the pool, but for the few that the student could not take.
        for entry in heapq.merge(
            *logs, _duplicates(rows, lost), key=lambda entry: (order.get(entry["source"], 0), entry["line"])
        ):
            file.write(json.dumps(entry) + "\n")
            count += 1
    return count


def _duplicates(rows: _Rows, lost: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(lost), PART_ROWS):
        table = rows.take(lost[start : start + PART_ROWS], ["problem_id", "candidate_id", "source", "line"])
        for problem, candidate, source, line in zip(*table.to_pydict().values(), strict=True):
            yield {"source": source, "line": line, "reason": duplicate((problem, candidate))}


def _write_metrics(shards: Sequence[_Shard], path: Path) -> None:
    """The logs of all shards, one after the other, as runs of one directory."""
    run = 0
    with atomic_open(path) as file:
        for shard in shards:
            before = run
            for entry in _entries(shard.directory / METRICS):
                run = before + entry["run"]
                file.write(json.dumps(entry | {"run": run}) + "\n")


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log. The file is not kept open: there may be more shards than files a process may have.

    Raises:
        UserError: it cannot be read.
    """
    end = 0
    try:
        while True:
            with open(path, "rb") as file:
                file.seek(end)
                lines = file.readlines(1 << 16)
            if not lines:
                return
            end += sum(map(len, lines))
            yield from map(json.loads, lines)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _timing(shards: Sequence[_Shard]) -> dict[str, float | None]:
    """Of the shards' runs, one after the other."""
    own = [shard.manifest["timing"] for shard in shards]
    total = {name: sum(one[name] or 0 for one in own) for name in ("seconds", "input_tokens", "scored_tokens")}
    seconds = total["seconds"]
    return total | {"tokens_per_second": total["input_tokens"] / seconds if seconds else None, "ceiling_share": None}


def _move(building: Path, out: Path) -> None:
    """Put a whole store in the place of what is there; stopped anywhere, the next call goes on."""
    parts = read_manifest(building)["merged"]["parts"]
    (out / MANIFEST).unlink(missing_ok=True)  # nobody may take half of one and half of the other for a store
    others = [part for part in part_files(out) if part_number(part) >= parts]
    for file in [*others, *out.glob("journal-*"), out / LARK_JSON]:
        file.unlink(missing_ok=True)
    for file in [*part_files(building), building / REJECTS, building / METRICS]:
        if file.exists():
            os.replace(file, out / file.name)
    fsync_directory(out)
    os.replace(building / MANIFEST, out / MANIFEST)
    fsync_directory(out)
    shutil.rmtree(building)
