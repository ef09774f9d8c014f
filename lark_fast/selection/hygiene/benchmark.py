"""The items of a benchmark, from any file that people keep them in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lark_fast.errors import RejectError, UserError
from lark_fast.pool.decoding import read_chunks
from lark_fast.pool.reading import Pool
from lark_fast.pool.splitting import Unsplit, split_lines

FIELDS = ("problem", "question", "prompt", "text", "messages")
OPTION = "--decontaminate"
_STRUCTURED = (".jsonl", ".ndjson", ".json", ".parquet")
_PACKED = (".gz", ".zst")
_MAX_ITEM_BYTES = 64 << 20
_BOM = "\ufeff"


def read_items(path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, texts) for every item of the file: what it asks, a text a turn.

    JSONL, JSON lists and Parquet are known by their names; of an item the first of FIELDS that it has counts, and of a
    conversation the user's turns. Every other file is plain text, an item a line. ``.gz`` and ``.zst`` are unpacked.

    Raises:
        UserError: there is no such file, it cannot be read, or an item is not as it should be; names file and line.
    """
    if not Path(path).is_file():
        raise UserError(f"{OPTION} {path}: there is no such file")
    name = Path(path).name.lower()
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    return _structured_items(path) if name.endswith(_STRUCTURED) else _plain_items(path)


def _structured_items(path: str) -> Iterator[tuple[int, list[str]]]:
    for raw in Pool([path], max_record_bytes=_MAX_ITEM_BYTES).read_raw():
        where = f"{OPTION} {path}:{raw.line}"
        if isinstance(raw.content, RejectError):
            raise UserError(f"{where}: {raw.content}")
        item = _parsed(raw.content, where) if isinstance(raw.content, bytes) else raw.content
        if not isinstance(item, dict):
            raise UserError(f"{where}: an item must be a JSON object; plain text goes into a file named *.txt")
        yield raw.line, _texts(item, where)


def _plain_items(path: str) -> Iterator[tuple[int, list[str]]]:
    unsplit = Unsplit(read_chunks(Path(path), lambda size: None))
    for line, content in split_lines(unsplit, _MAX_ITEM_BYTES):
        where = f"{OPTION} {path}:{line}"
        if isinstance(content, RejectError):
            raise UserError(f"{where}: {content}")
        text = _decoded(content, where)
        if text.startswith("{") and _is_object(text):
            raise UserError(f"{where}: is JSON, but the file is read as plain text; name it *.jsonl")
        yield line, [text]
    if unsplit.damage is not None:
        raise UserError(f"{OPTION} {path}:{unsplit.line}: {unsplit.damage}")


def _texts(item: dict[str, Any], where: str) -> list[str]:
    field = next((name for name in FIELDS if item.get(name) is not None), None)
    if field is None:
        raise UserError(f"{where}: has none of the fields {', '.join(FIELDS)}; rename the one that holds the text")
    value = item[field]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"{where}: {field} is neither a text nor a list of messages")
    texts = [_content(turn.get("content"), field, where) for turn in value if turn.get("role") == "user"]
    if not texts:
        raise UserError(f"{where}: {field} has no turn of the user")
    return texts


def _content(content: Any, field: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if texts and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise UserError(f"{where}: the content of a turn in {field} is not a text")


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode().removeprefix(_BOM)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}") from None


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(_decoded(content, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: invalid JSON: {error.msg} at character {error.pos + 1} of the item") from None
    except (RecursionError, ValueError):
        raise UserError(f"{where}: the JSON is nested too deeply, or holds an integer of too many digits") from None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (RecursionError, ValueError):
        return False
