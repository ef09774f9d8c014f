"""Chunks of a pool file become texts of single records: the part not yet split, and how to split lines off it."""

import json
import re
from collections.abc import Iterator

from lark_fast.errors import RejectError
from lark_fast.pool.decoding import DamagedFileError


class Unsplit:
    """Bytes that were read but belong to no record yet, and where in the file they start."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.data, self.line, self.column = bytearray(), 1, 0
        self.damage: DamagedFileError | None = None
        self._chunks = chunks

    def more(self) -> bool:
        """Append the next chunk; False when the file has ended, be it by damage."""
        try:
            self.data += next(self._chunks)
        except StopIteration:
            return False
        except DamagedFileError as damage:
            self.damage = damage
            return False
        return True

    def drop(self, end: int) -> None:
        """Forget the bytes before index ``end``."""
        last_newline = self.data.rfind(b"\n", 0, end)
        if last_newline < 0:
            self.column += end
        else:
            self.column = end - last_newline - 1
            self.line += self.data.count(b"\n", 0, end)
        del self.data[:end]

    def skip(self, pattern: re.Pattern[bytes]) -> bool:
        """Forget what matches ``pattern``; False when nothing is left behind it."""
        while True:
            self.drop(pattern.match(self.data).end())
            if self.data:
                return True
            if not self.more():
                return False


def split_lines(unsplit: Unsplit, max_record_bytes: int) -> Iterator[tuple[int, bytes | RejectError]]:
    """Yield (line, text) for every line that is not blank, up to the end of the file."""
    data, start, searched = unsplit.data, 0, 0
    while True:
        end = data.find(b"\n", searched)
        if end >= 0:
            if end - start > max_record_bytes:
                yield unsplit.line, too_long(max_record_bytes)
            elif text := bytes(data[start:end]).strip():
                yield unsplit.line, text
            unsplit.line += 1
            start = searched = end + 1
            continue
        del data[:start]
        start, searched = 0, len(data)
        if len(data) > max_record_bytes:
            yield unsplit.line, too_long(max_record_bytes)
            _drop_line(unsplit)
            searched = 0
        elif not unsplit.more():
            break
    # Before damage only a whole record counts: the reject of the damage stands for a part of one.
    text = bytes(data).strip()
    data.clear()
    if text and (unsplit.damage is None or _is_json(text)):
        yield unsplit.line, text


def too_long(max_record_bytes: int) -> RejectError:
    """Return the reject of a record beyond the limit."""
    return RejectError(f"the record is longer than {max_record_bytes} bytes")


def _drop_line(unsplit: Unsplit) -> None:
    while (end := unsplit.data.find(b"\n")) < 0:
        unsplit.data.clear()
        if not unsplit.more():
            return
    unsplit.drop(end + 1)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
