"""A pool: files, in order, become Records; whatever cannot be one becomes a Rejected with the reason."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lark_fast.errors import RejectError
from lark_fast.pool.decoding import read_chunks
from lark_fast.pool.files import cannot_read, find_pool_files
from lark_fast.pool.json_list import split_list
from lark_fast.pool.parquet_rows import read_parquet_rows
from lark_fast.pool.records import Record, normalise
from lark_fast.pool.shares import Share
from lark_fast.pool.splitting import Unsplit, split_lines

_BOM = "\ufeff"
_BLANK = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*")
_PARQUET = b"PAR1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One record, or the rest of a damaged file, that cannot be used."""

    source: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRecord:
    """One record as it lies in the pool, told from its neighbours and not yet looked into. It can be pickled."""

    source: str
    line: int
    ordinal: int
    position: int  # how many bytes of the pool have been read so far; never falls
    content: bytes | dict[str, Any] | RejectError  # JSON text, a Parquet row, or why there is none

    def parse(self) -> Record | Rejected:
        """Return the record, or the reason why it cannot be used."""
        try:
            if isinstance(self.content, RejectError):
                raise self.content
            raw = _parse_json(self.content) if isinstance(self.content, bytes) else self.content
            return normalise(raw, source=self.source, line=self.line, ordinal=self.ordinal)
        except RejectError as error:
            return Rejected(source=self.source, line=self.line, reason=str(error))


class Pool:
    """The records behind a list of paths, read one after the other in bounded memory.

    Attributes: ``files``, in reading order; ``total_bytes``, their size on disk; ``bytes_read``, how much of that
    the reading under way has covered, and ``ordinals``, how many records, those of other shares too.
    """

    def __init__(self, paths: Sequence[str], *, max_record_bytes: int = 64 << 20, share: Share | None = None) -> None:
        """Find the files; UserError when there is nothing behind a path.

        With ``share`` only its records are yielded; all others are passed over unparsed.
        """
        named = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        self._paths = [Path(path) for path in named]
        self.files = find_pool_files(named)
        self.max_record_bytes, self.share = max_record_bytes, share
        self._sizes = [_size(file) for file in self.files]
        self.total_bytes = sum(self._sizes)
        self.bytes_read = self._end = self.ordinals = 0

    @property
    def sizes(self) -> dict[str, int]:
        """The files in reading order, each with its size in bytes when it was found."""
        return dict(zip(map(str, self.files), self._sizes, strict=True))

    @property
    def inputs(self) -> list[Path]:
        """The files, and the directories that were named: nothing may be written into these."""
        return [*self.files, *(path for path in self._paths if path.is_dir())]

    def read(self, limit: int | None = None) -> Iterator[Record | Rejected]:
        """Yield every record of the pool in order, usable or not, of the first ``limit`` of them.

        Raises UserError when a file has gone or cannot be read.
        """
        for raw in self.read_raw(limit):
            yield raw.parse()

    def read_raw(self, limit: int | None = None) -> Iterator[RawRecord]:
        """Yield every record of the pool as it lies there, for others to parse; see ``read``."""
        self.bytes_read = self._end = self.ordinals = 0
        if limit == 0:
            return
        for file, size in zip(self.files, self._sizes, strict=True):
            source = str(file)
            self._end += size
            with closing(self._read_file(file)) as raws:
                for line, content in raws:
                    ordinal = self.ordinals
                    self.ordinals += 1
                    if self.share is None or self.share.has(ordinal):
                        yield RawRecord(
                            source=source, line=line, ordinal=ordinal, position=self.bytes_read, content=content
                        )
                    if self.ordinals == limit:
                        return
            self.bytes_read = self._end

    def _read_file(self, file: Path) -> Iterator[tuple[int, bytes | dict[str, Any] | RejectError]]:
        if _is_parquet(file):
            return read_parquet_rows(file, self._count, self.max_record_bytes)
        return _split_records(read_chunks(file, self._count), self.max_record_bytes)

    def _count(self, size: int) -> None:
        # A file may grow while it is read.
        self.bytes_read = min(self.bytes_read + size, self._end)


def _split_records(chunks: Iterator[bytes], max_record_bytes: int) -> Iterator[tuple[int, bytes | RejectError]]:
    """Yield (line, text) for every record of a JSONL file or a JSON list, told apart by the first character.

    In place of a text comes the RejectError that says why there is none; the last one tells of damage to the file.
    What follows a list is read as a file of its own.
    """
    unsplit = Unsplit(chunks)
    while unsplit.skip(_BLANK):
        split = split_list if unsplit.data.startswith(b"[") else split_lines
        yield from split(unsplit, max_record_bytes)
    if unsplit.damage is not None:
        yield unsplit.line, RejectError(str(unsplit.damage))


def _parse_json(text: bytes) -> Any:
    try:
        # json.loads would guess the encoding of bytes and let surrogates pass.
        return json.loads(text.decode().removeprefix(_BOM))
    except UnicodeDecodeError as error:
        raise RejectError(f"not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start} of the record") from None
    except json.JSONDecodeError as error:
        raise RejectError(f"invalid JSON: {error.msg} at character {error.pos + 1} of the record") from None
    except RecursionError:
        raise RejectError("the JSON is nested too deeply") from None
    except ValueError:
        raise RejectError("the JSON holds an integer of too many digits") from None


def _is_parquet(file: Path) -> bool:
    if file.name.lower().endswith(".parquet"):
        return True
    try:
        with open(file, "rb") as stream:
            return stream.read(len(_PARQUET)) == _PARQUET
    except OSError as error:
        raise cannot_read(file, error) from None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise cannot_read(file, error) from None
