"""The files of the released Rank-Surprisal Ratio code: what it reads, what it writes, and where.

ROOT/_inferred_data/MODEL/PATH.parquet   every scored token's position, probability, nll and rank (or .jsonl)
ROOT/_inferred_data/MODEL/PATH.partial/  windows of samples that a stopped run had done; gone once the file is there
ROOT/_sample_metrics/MODEL/PATH.jsonl    a line a sample
ROOT/rsr_MODEL.tsv                       a line a data file
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lark_fast.errors import UserError
from lark_fast.files import atomic_open, atomic_path
from lark_fast.line_store import LineStore

INFERRED, METRICS = "_inferred_data", "_sample_metrics"
SUFFIXES = (".json", ".jsonl")
_TOKENS = {"resp_token_positions": pa.int64(), "probs": pa.float64(), "nlls": pa.float64(), "ranks": pa.int64()}
_NUMBERS = "avg_resp_token_length avg_rank_clip avg_surprisal rank_surprisal_ratio infer_seconds metrics_seconds"


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of samples."""

    path: Path
    relative: Path  # its path below the data's root, without its suffix

    @property
    def name(self) -> str:
        """What the table calls it."""
        return "__".join(self.relative.parts)


def find_data(
    data_path: str, data_root: str, name_ends_with: str = "", leave_out: Sequence[Path] = ()
) -> list[DataFile]:
    """The file, or those in the directory, whose names have that end, sorted; without those in some directories.

    Raises:
        UserError: there is none, or two would be written to the same place.
    """
    path, root, outputs = Path(data_path).resolve(), Path(data_root).resolve(), [one.resolve() for one in leave_out]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        found = [file for file in found if not any(file.is_relative_to(output) for output in outputs)]
    else:
        found = [path] if path.is_file() else []
    if not found:
        raise UserError(f"--data_path {data_path}: no such file, nor a directory with {' or '.join(SUFFIXES)} files")
    files: dict[Path, DataFile] = {}
    for file in found:
        inside = file.is_relative_to(root)
        one = DataFile(file, (file.relative_to(root) if inside else Path(file.name)).with_suffix(""))
        if not one.name.endswith(name_ends_with):
            continue
        if one.relative in files:
            other = files[one.relative].path
            raise UserError(f"--data_path {data_path}: {other} and {file} have one name; give them by themselves")
        files[one.relative] = one
    if not files:
        raise UserError(f"--filter_file_suffix {name_ends_with}: no name in {data_path} ends so")
    return list(files.values())


class Begun(LineStore):
    """Inference of one file, as far as it has come: a line a window.

    Attributes:
        n_samples: that are done.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.n_samples = 0
        super().__init__(str(directory), identity, lines="windows.jsonl", overwrite=overwrite)

    def take(self, entry: dict[str, Any]) -> None:
        """See ``LineStore``."""
        self.n_samples += len(entry["samples"])

    def add(self, window: list[dict[str, Any]]) -> None:
        """Keep a window's results; after this returns they survive anything."""
        self.keep({"samples": window})
        self.n_samples += len(window)

    def results(self) -> Iterator[dict[str, Any]]:
        """All of them, in order."""
        with open(self.directory / "windows.jsonl", encoding="utf-8") as file:
            for line in file:
                yield from json.loads(line)["samples"]

    def remove(self) -> None:
        """It is elsewhere now: take away the directory, which is closed."""
        for file in self.directory.iterdir():
            file.unlink()
        self.directory.rmdir()


def write_inference(path: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Write inference results, at least one, as the original does; the path's suffix says how. Atomic."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        write_jsonl(path, results)
        return
    results = iter(results)
    first = next(results)
    names = pa.string() if isinstance(first["sample_id"], str) else pa.int64()
    schema = pa.schema([("sample_id", names), *((name, pa.list_(kind)) for name, kind in _TOKENS.items())])
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="snappy") as writer:
        for result in chain([first], results):
            writer.write_batch(pa.RecordBatch.from_pylist([{name: result[name] for name in schema.names}], schema))


def read_inference(path: Path) -> Iterator[dict[str, Any]]:
    """Yield inference results that the original or ``write_inference`` has written.

    Raises:
        UserError: they cannot be read.
    """
    try:
        if path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as file:
                for line in file:
                    if line.strip():
                        yield json.loads(line)
            return
        known = {"sample_id", *_TOKENS}
        for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield row | {"metadata": {name: value for name, value in row.items() if name not in known}}
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}); remove it, and it is made again") from error


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a line a mapping, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def upsert_tsv(path: Path, row: Mapping[str, Any]) -> None:
    """Set a data file's row in the table, which is sorted by ``data_name``; numbers have five decimals, None is empty.

    Raises:
        UserError: what is there is no such table.
    """
    names = ["data_name", *_NUMBERS.split()]
    rows: list[dict[str, str]] = []
    if path.exists():
        try:
            with open(path, encoding="utf-8", newline="") as file:
                table = csv.DictReader(file, dialect="excel-tab", strict=True)
                rows = [one for one in table if one["data_name"] != row["data_name"]]
                names += [name for name in table.fieldnames or () if name not in names]
        except (KeyError, ValueError, csv.Error) as error:
            raise UserError(f"{path}: is no table with a column data_name; move it away") from error
    rows.append({name: f"{value:.5f}" if isinstance(value, float) else value or "" for name, value in row.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        table = csv.DictWriter(file, names, dialect="excel-tab", lineterminator="\n", extrasaction="ignore")
        table.writeheader()
        table.writerows(sorted(rows, key=lambda one: one["data_name"]))
