"""A file that only grows, by frames, each of which is on the disk when ``append`` returns.

    length     4 bytes, little-endian: of the payload
    check      4 bytes: CRC32 of the length and the payload, so that the zeros a power cut may leave are no frame
    payload

Whatever lies behind the last whole frame is the rest of one that was never acknowledged; the next frame goes there.
"""

import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

from lark_fast.files import fsync_directory

_LENGTH, _CHECK = struct.Struct("<I"), struct.Struct("<I")
_HEADER = _LENGTH.size + _CHECK.size


class Journal:
    """One such file.

    Nothing is touched before the first ``append``: reading alone changes no byte.

    Args:
        path: where it is; made by the first ``append`` when it does not exist.

    Attributes:
        frames: the payloads of the whole frames that were there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frames, self._end = _read_frames(path)
        self._descriptor: int | None = None

    def append(self, payload: bytes | memoryview) -> None:
        """Add a frame; after this returns it survives anything.

        Raises:
            OSError: the disk is full or broken. The frames before this one stay, and ``append`` may be tried again.
        """
        length = _LENGTH.pack(len(payload))
        check = _CHECK.pack(zlib.crc32(payload, zlib.crc32(length)))
        frame = memoryview(b"".join((length, check, payload)))
        if self._descriptor is None:
            self._descriptor = self._open()
        try:
            written = 0
            while written < len(frame):
                written += os.pwrite(self._descriptor, frame[written:], self._end + written)
            os.fsync(self._descriptor)
            self._end += len(frame)
        except BaseException:
            # The next opening would find the end all the same, but a full disk wants its space back.
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise

    def remove(self) -> None:
        """Remove the file, where there is one."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let the file go; the next ``append`` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.ftruncate(descriptor, self._end)
            fsync_directory(self.path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _read_frames(path: Path) -> tuple[list[memoryview], int]:
    """The payloads of the whole frames, and where the last of them ends."""
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError:
        return [], 0
    frames, end = [], 0
    while len(content) - end >= _HEADER:
        length = content[end : end + _LENGTH.size]
        (check,) = _CHECK.unpack(content[end + _LENGTH.size : end + _HEADER])
        (size,) = _LENGTH.unpack(length)
        payload = content[end + _HEADER : end + _HEADER + size]
        if len(payload) < size or zlib.crc32(payload, zlib.crc32(length)) != check:
            break
        frames.append(payload)
        end += _HEADER + size
    return frames, end
