"""A JSON list of any length, element by element: only strings and brackets are tracked, nothing is parsed."""

import re
from collections.abc import Iterator

from lark_fast.errors import RejectError
from lark_fast.pool.splitting import Unsplit, too_long

_SEPARATORS = re.compile(rb"[\s,]*")
_BARE_WORD = re.compile(rb'[^\s,\[\]{}"]*')
_STRUCTURE = re.compile(rb'["{}\[\]]')
_STRING_REST = re.compile(rb'(?:[^"\\\n]+|\\[\s\S])*+')
_OPENER_OF = {b"}": b"{", b"]": b"["}
_MAX_INDENT = 64
# An element that holds what looks like the start of another is believed up to this length, then taken for broken.
_SUSPECT_BYTES = 1 << 18
# All that may be scanned a second time: enough for hundreds of broken elements, little enough for a hostile file.
_RESCAN_BYTES = 1 << 26


class _BrokenElementError(Exception):
    """An element does not end as one should; ``at`` is how far it was scanned."""

    def __init__(self, reason: str, at: int) -> None:
        super().__init__(reason)
        self.at = at


def split_list(unsplit: Unsplit, max_record_bytes: int) -> Iterator[tuple[int, bytes | RejectError]]:
    """Yield (line, text) for every element of the list that ``unsplit`` starts with, up to its closing bracket.

    An element that cannot be told from its neighbours (a line break inside a string, a missing bracket) is rejected,
    and reading goes on at the next line that starts like an element: with "{", not indented more than this one was.
    """
    unsplit.drop(1)
    rescan_bytes = _RESCAN_BYTES
    while unsplit.skip(_SEPARATORS):
        if unsplit.data.startswith(b"]"):
            unsplit.drop(1)
            return
        line = unsplit.line
        next_element = re.compile(rb"\n[ \t]{0,%d}(?=[{\]])" % min(unsplit.column, _MAX_INDENT))
        try:
            end, dropped = _scan_element(unsplit, max_record_bytes, next_element)
        except _BrokenElementError as broken:
            cut_short = unsplit.damage is not None
            # A broken element may have swallowed its neighbours. Going back to them costs time, so not without bound.
            rescan_bytes -= broken.at
            found = _resume(unsplit, next_element, 0 if rescan_bytes > 0 else broken.at)
            if found or not cut_short:
                yield line, RejectError(str(broken))
            if not found:
                return
        else:
            too_much = dropped or end > max_record_bytes
            yield line, too_long(max_record_bytes) if too_much else bytes(unsplit.data[:end])
            unsplit.drop(end)
    if unsplit.damage is None:
        yield unsplit.line, RejectError("the list has no end")


def _scan_element(unsplit: Unsplit, max_record_bytes: int, next_element: re.Pattern[bytes]) -> tuple[int, bool]:
    """Return the index behind the element that ``unsplit`` starts with, and whether its beginning had to be dropped."""
    data = unsplit.data
    is_bare, in_string, open_brackets = data[0] not in b'"{[', False, bytearray()
    at, dropped, checked, is_suspect = 0, False, 0, False
    while True:
        if is_bare:
            at = _BARE_WORD.match(data, at).end()
            if at < len(data):
                return max(at, 1), dropped
        elif in_string:
            at = _STRING_REST.match(data, at).end()
            if data.startswith(b'"', at):
                at, in_string = at + 1, False
                if not open_brackets:
                    return at, dropped
                continue
            if data.startswith(b"\n", at):
                raise _BrokenElementError("invalid JSON: a line break inside a string", at)
        elif found := _STRUCTURE.search(data, at):
            at, sign = found.end(), found[0]
            if sign == b'"':
                in_string = True
            elif sign in b"{[":
                open_brackets += sign
            elif (opener := open_brackets.rfind(_OPENER_OF[sign])) >= 0:
                # Brackets left open inside these are the JSON parser's to complain about, as are those never opened.
                del open_brackets[opener:]
                if not open_brackets:
                    return at, dropped
            continue
        else:
            at = len(data)

        is_suspect = is_suspect or next_element.search(data, checked) is not None
        checked = max(len(data) - _MAX_INDENT - 2, 0)
        if is_suspect and len(data) > min(_SUSPECT_BYTES, max_record_bytes):
            raise _BrokenElementError("invalid JSON: this list element does not end before the next one starts", at)
        if len(data) > max_record_bytes:
            unsplit.drop(at)
            at, dropped, checked = 0, True, 0
        if not unsplit.more():
            raise _BrokenElementError("invalid JSON: the file ends inside this list element", at)


def _resume(unsplit: Unsplit, next_element: re.Pattern[bytes], start: int) -> bool:
    """Drop everything before the next line that matches; False when there is none up to the end of the file."""
    while True:
        if found := next_element.search(unsplit.data, start):
            unsplit.drop(found.end())
            return True
        # The beginning of a line that is still being read may yet match, but only while it is short.
        last_newline = unsplit.data.rfind(b"\n")
        is_decided = last_newline < 0 or len(unsplit.data) - last_newline > _MAX_INDENT + 1
        unsplit.drop(len(unsplit.data) if is_decided else last_newline)
        start = 0
        if not unsplit.more():
            unsplit.drop(len(unsplit.data))
            return False
