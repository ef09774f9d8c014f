"""A benchmark's file, of any kind that people keep them in, as one dict a problem."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lark_fast.errors import UserError
from lark_fast.pool.decoding import DamagedFileError, read_chunks
from lark_fast.pool.objects import MAX_OBJECT_BYTES, decoded, read_objects
from lark_fast.rendering.inspection import visible

OPTION = "--benchmark"
_PACKED = (".gz", ".zst")
_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_REMEDY = "; a benchmark is JSONL, a JSON list, Parquet, or CSV in a file named *.csv"


def stem(path: str) -> str:
    """A file's name without its directory and without what says of which kind it is."""
    name = Path(path).name
    for suffixes in (_PACKED, _KINDS):
        found = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")
        name = name[: len(name) - len(found)]
    return name


def read_items(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, fields) for every problem of the file, in its order.

    CSV, with a line of names, is known by its name; JSONL, a JSON list and Parquet by what they begin with. All may be
    compressed (gzip, zstd). The line is that of the first character; in Parquet it is the row.

    Raises:
        UserError: there is no such file, it cannot be read, it is damaged or too large, or a problem is not as it
            should be; names file and line.
    """
    shown = visible(path)
    if not Path(path).is_file():
        what = "is a directory; give the file in it" if Path(path).is_dir() else "there is no such file"
        raise UserError(f"{OPTION} {shown}: {what}")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"{OPTION} {shown}: cannot be read: {error.strerror or error}") from error
    is_csv = Path(path).name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".csv")
    return _csv_items(path) if is_csv else read_objects(path, OPTION, _REMEDY)


def _csv_items(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(_text_lines(path), strict=True)
    names, before = None, 0
    try:
        for row in rows:
            line, before = before + 1, rows.line_num
            if not row:
                continue
            if names is None:
                names = row
            elif len(row) != len(names):
                raise _fault(path, line, f"{len(row)} fields, but the first line names {len(names)}")
            else:
                yield line, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise _fault(path, before + 1, f"invalid CSV: {error}") from None


def _text_lines(path: str) -> Iterator[str]:
    """Lines with their ends, as the csv module wants them."""
    waiting, number = bytearray(), 1
    try:
        for chunk in read_chunks(Path(path), lambda size: None):
            waiting += chunk
            *lines, rest = waiting.split(b"\n")
            for line in lines:
                yield decoded(bytes(line) + b"\n", _where(path, number))
                number += 1
            waiting = bytearray(rest)
            if len(waiting) > MAX_OBJECT_BYTES:
                raise _fault(path, number, f"the line is longer than {MAX_OBJECT_BYTES} bytes")
    except DamagedFileError as damage:
        raise _fault(path, number, damage) from None
    if waiting:
        yield decoded(bytes(waiting), _where(path, number))


def _fault(path: str, line: int, reason: str | Exception) -> UserError:
    return UserError(f"{_where(path, line)}: {reason}")


def _where(path: str, line: int) -> str:
    return f"{OPTION} {visible(path)}:{line}"
