"""A pool file, plain or compressed, becomes chunks of bytes; damage ends it without losing what came before."""

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lark_fast.pool.files import cannot_read

_READ_BYTES = 1 << 14
_CHUNK_BYTES = 1 << 18
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_GZIP_WBITS = 31


class DamagedFileError(Exception):
    """The rest of a file cannot be read; the message is the reason for rejected.jsonl."""


def read_chunks(
    path: Path, on_read: Callable[[int], None], *, free_bytes: int = 1 << 30, max_ratio: int = 500
) -> Iterator[bytes]:
    """Yield the content of ``path``, decompressed if its name or first bytes say gzip or zstd, in bounded chunks.

    ``on_read`` hears how many bytes were read from disk. Raises DamagedFileError behind the last good byte, also
    where the content exceeds both ``free_bytes`` and ``max_ratio`` times the file's size, and UserError when the
    file cannot be opened or read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(_ZSTD))
            file.seek(0)
            source = _CountingReader(file, on_read)
            if not head and (kind := _kind_by_name(path)):
                raise DamagedFileError(f"truncated {kind}: the file is empty")
            limit = max(free_bytes, max_ratio * os.fstat(file.fileno()).st_size)
            for chunk in _decoder(path, head)(source):
                limit -= len(chunk)
                if limit < 0:
                    raise DamagedFileError(too_much_content(free_bytes, max_ratio))
                yield chunk
    except OSError as error:
        raise cannot_read(path, error) from None


def _decoder(path: Path, head: bytes) -> Callable[["_CountingReader"], Iterator[bytes]]:
    kind = _kind_by_name(path)
    if kind == "gzip" or head.startswith(_GZIP):
        return _gunzip
    if kind == "zstd" or head == _ZSTD:
        return _unzstd
    return lambda source: iter(source.read, b"")


def _kind_by_name(path: Path) -> str | None:
    return {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())


def too_much_content(free_bytes: int, max_ratio: int) -> str:
    """Return the reason for cutting off a file that unpacks to more than any honest one."""
    return f"the content exceeds {free_bytes} bytes and {max_ratio} times the file's size; the rest is not read"


class _CountingReader:
    """The part of a file's interface that decompressors need, with a report of every read."""

    def __init__(self, file: BinaryIO, on_read: Callable[[int], None]) -> None:
        self._file, self._on_read, self.closed = file, on_read, False

    def read(self, size: int = _READ_BYTES) -> bytes:
        # Arrow decodes what one read gives in one go and loses it all at an error, so it is fed little by little.
        data = self._file.read(min(size, _READ_BYTES) if size > 0 else _READ_BYTES)
        self._on_read(len(data))
        return data

    def close(self) -> None:
        self.closed = True


def _gunzip(source: _CountingReader) -> Iterator[bytes]:
    """Yield the content of all members. Python's gzip would drop what precedes an error in the same read."""
    waiting = source.read()
    while waiting:
        member = zlib.decompressobj(_GZIP_WBITS)
        piece = b""
        while not member.eof:
            # A full piece may leave output inside zlib even when all input is consumed.
            if not waiting and len(piece) < _CHUNK_BYTES and not (waiting := source.read()):
                raise DamagedFileError("truncated gzip: the file ends inside the compressed data")
            before = member.copy()
            try:
                piece = member.decompress(waiting, _CHUNK_BYTES)
            except zlib.error as error:
                yield from _inflate_up_to_error(before, waiting)
                raise DamagedFileError(f"corrupt gzip: {error}") from None
            if piece:
                yield piece
            waiting = member.unconsumed_tail
        # Members may be padded with zeros.
        waiting = member.unused_data.lstrip(b"\0")
        while not waiting and (block := source.read()):
            waiting = block.lstrip(b"\0")


def _inflate_up_to_error(member: "zlib._Decompress", waiting: bytes) -> Iterator[bytes]:
    """Yield what can be decompressed before the error that is known to come, to the byte."""
    for size in (4096, 64, 1):
        while True:
            before = member.copy()
            try:
                piece = member.decompress(waiting, size)
            except zlib.error:
                member = before
                break
            if not piece:
                break
            yield piece
            waiting = member.unconsumed_tail


def _unzstd(source: _CountingReader) -> Iterator[bytes]:
    import pyarrow as pa

    stream = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")
    while True:
        buffer = bytearray(_CHUNK_BYTES)
        try:
            size = stream.readinto(buffer)
        except (OSError, pa.ArrowException) as error:
            # Arrow does not say how much it had written, but JSON holds no zero bytes: those are not text.
            if piece := bytes(buffer.rstrip(b"\0")):
                yield piece
            kind = "truncated" if "runcated" in str(error) else "corrupt"
            raise DamagedFileError(f"{kind} zstd: {error}") from None
        if not size:
            return
        yield bytes(buffer[:size])
