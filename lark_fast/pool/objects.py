"""A file of JSON objects or Parquet rows that has to be right as a whole: its first fault is the user's to mend."""

import json
from collections.abc import Iterator
from typing import Any

from lark_fast.errors import RejectError, UserError
from lark_fast.pool.reading import Pool

MAX_OBJECT_BYTES = 64 << 20
_BOM = "\ufeff"


def read_objects(path: str, option: str, remedy: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) of a JSONL file, a JSON list or a Parquet file, plain or compressed.

    Args:
        path: the file.
        option: that named it, for messages.
        remedy: what to do about a line that is JSON but no object.

    Raises:
        UserError: the file cannot be read, or a line is no object; names file and line.
    """
    for raw in Pool([path], max_record_bytes=MAX_OBJECT_BYTES).read_raw():
        where = f"{option} {path}:{raw.line}"
        if isinstance(raw.content, RejectError):
            raise UserError(f"{where}: {raw.content}")
        item = _parsed(raw.content, where) if isinstance(raw.content, bytes) else raw.content
        if not isinstance(item, dict):
            raise UserError(f"{where}: an item must be a JSON object{remedy}")
        yield raw.line, item


def decoded(content: bytes, where: str) -> str:
    """UTF-8 without its mark.

    Raises:
        UserError: it is not.
    """
    try:
        return content.decode().removeprefix(_BOM)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}") from None


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(decoded(content, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: invalid JSON: {error.msg} at character {error.pos + 1} of the item") from None
    except (RecursionError, ValueError):
        raise UserError(f"{where}: the JSON is nested too deeply, or holds an integer of too many digits") from None
