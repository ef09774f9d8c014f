"""The items of a benchmark, from any file that people keep them in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lark_fast.errors import RejectError, UserError
from lark_fast.pool.decoding import read_chunks
from lark_fast.pool.objects import MAX_OBJECT_BYTES, decoded, read_objects
from lark_fast.pool.splitting import Unsplit, split_lines

FIELDS = ("problem", "question", "prompt", "text", "messages")
OPTION = "--decontaminate"
_STRUCTURED = (".jsonl", ".ndjson", ".json", ".parquet")
_PACKED = (".gz", ".zst")


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
    for line, item in read_objects(path, OPTION, "; plain text goes into a file named *.txt"):
        yield line, _texts(item, f"{OPTION} {path}:{line}")


def _plain_items(path: str) -> Iterator[tuple[int, list[str]]]:
    unsplit = Unsplit(read_chunks(Path(path), lambda size: None))
    for line, content in split_lines(unsplit, MAX_OBJECT_BYTES):
        where = f"{OPTION} {path}:{line}"
        if isinstance(content, RejectError):
            raise UserError(f"{where}: {content}")
        text = decoded(content, where)
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


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (RecursionError, ValueError):
        return False
