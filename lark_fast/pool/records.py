"""One raw pool record, in any of the accepted forms, becomes a Record or a RejectError that says why not."""

import base64
import datetime
import decimal
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lark_fast.errors import RejectError
from lark_fast.hashing import hash_fields

Message = dict[str, str]

NOT_SCORED = -100
_MAX_DEPTH = 100  # of unknown columns; far below what json.dumps can write
_MAX_TOKEN_ID = 2**31 - 1

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_SHAREGPT_ROLES = _ROLES | {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "observation": "tool",
}
_FORM_COLUMNS = ("messages", "conversations", "prompt", "completion", "response", "input_ids", "labels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One candidate trajectory. Either ``messages`` or ``input_ids`` and ``labels`` are there, the rest is None."""

    source: str  # the pool file, "" for a record handed over in Python
    line: int  # 1-based: the line (JSONL), the line of the first character (JSON list), the row (Parquet)
    ordinal: int  # 0-based position in the whole pool, rejects counted too
    problem_id: int | str
    candidate_id: int | str
    teacher: str  # "" when unknown
    messages: tuple[Message, ...] | None  # each exactly {"role": ..., "content": ...}
    input_ids: tuple[int, ...] | None
    labels: tuple[int, ...] | None  # -100 where not scored, elsewhere equal to input_ids
    extra: dict[str, Any]  # unknown columns, fit for JSON

    @property
    def key(self) -> tuple[str, str]:
        """The pair that names the record in scores and selections: problem and candidate as strings."""
        return str(self.problem_id), str(self.candidate_id)

    def content_hash(self) -> bytes:
        """Return 16 bytes that change with any role, text, id or label, and with nothing else."""
        if self.messages is not None:
            return hash_fields(b"messages", *_message_fields(self.messages), size=16)
        return hash_fields(b"tokens", _packed(self.input_ids), _packed(self.labels), size=16)


def normalise(raw: Any, *, source: str = "", line: int = 0, ordinal: int = 0) -> Record:
    """Turn one raw record into a Record.

    Accepted are ``messages``, ShareGPT ``conversations``, ``prompt`` + ``completion``|``response`` and
    ``input_ids`` + ``labels``; the first of these that is there counts. ``problem_id`` defaults to a hash of the
    prompt, ``candidate_id`` to ``ordinal``, ``teacher`` to "". All other columns go to ``extra``.

    Raises RejectError with the reason when the record cannot be used.
    """
    if not isinstance(raw, dict):
        raise RejectError(f"a record must be a JSON object, this is {_kind(raw)}")
    columns = dict(raw)
    problem_id = _pop_id(columns, "problem_id")
    candidate_id = _pop_id(columns, "candidate_id")
    teacher = columns.pop("teacher", None)
    teacher = "" if teacher is None else _text(teacher, "teacher")

    messages = input_ids = labels = None
    if columns.get("messages") is not None:
        messages = _messages(columns.pop("messages"), "messages")
    elif columns.get("conversations") is not None:
        messages = _pop_sharegpt(columns)
    elif columns.get("prompt") is not None and _answer_column(columns):
        messages = _pop_prompt_and_answer(columns)
    elif columns.get("input_ids") is not None and columns.get("labels") is not None:
        input_ids, labels = _pop_tokens(columns)
    else:
        raise RejectError(_what_is_missing(columns))

    if messages is not None:
        first_turn = _check_turns(messages)
        prompt = _message_fields(messages[:first_turn])
    else:
        first_label = next(position for position, label in enumerate(labels) if label != NOT_SCORED)
        prompt = [_packed(input_ids[:first_label])]
    return Record(
        source=source,
        line=line,
        ordinal=ordinal,
        problem_id=hash_fields(b"prompt", *prompt, size=16).hex() if problem_id is None else problem_id,
        candidate_id=ordinal if candidate_id is None else candidate_id,
        teacher=teacher,
        messages=messages,
        input_ids=input_ids,
        labels=labels,
        extra=_extra(columns),
    )


def _pop_id(columns: dict[str, Any], name: str) -> int | str | None:
    """Return the id, None when the column is absent."""
    if name not in columns:
        return None
    value = columns.pop(name)
    if isinstance(value, str):
        if not value:
            raise RejectError(f"{name} is empty")
        return _text(value, name)
    if value is None:
        raise RejectError(f"{name} is null; leave the column out to have a default")
    if isinstance(value, bool) or not isinstance(value, int):
        raise RejectError(f"{name} is {_kind(value)}, it must be an integer or a string")
    if value.bit_length() > 63:
        raise RejectError(f"{name} does not fit in 64 bits; write it as a string")
    return value


def _pop_sharegpt(columns: dict[str, Any]) -> tuple[Message, ...]:
    messages = _messages(columns.pop("conversations"), "conversations", _SHAREGPT_ROLES)
    system = columns.pop("system", None)
    if system is None or not (system := _text(system, "system")):
        return messages
    if messages[0]["role"] != "system":
        return ({"role": "system", "content": system}, *messages)
    if messages[0]["content"] != system:
        raise RejectError("there are two system prompts: the column 'system' and the first of 'conversations'")
    return messages


def _answer_column(columns: dict[str, Any]) -> str | None:
    return next((name for name in ("completion", "response") if columns.get(name) is not None), None)


def _pop_prompt_and_answer(columns: dict[str, Any]) -> tuple[Message, ...]:
    name = _answer_column(columns)
    prompt, answer = columns.pop("prompt"), columns.pop(name)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer, "reasoning_content": columns.pop("reasoning_content", None)}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = _messages(answer, name)
    if all(turn["role"] != "assistant" for turn in turns):
        raise RejectError(f"{name} has no assistant turn")
    return _messages(prompt, "prompt") + turns


def _pop_tokens(columns: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    input_ids, labels = _integers(columns.pop("input_ids"), "input_ids"), _integers(columns.pop("labels"), "labels")
    if len(input_ids) != len(labels):
        raise RejectError(f"input_ids has {len(input_ids)} entries but labels has {len(labels)}")
    if not input_ids:
        raise RejectError("input_ids is empty")
    if min(input_ids) < 0 or max(input_ids) > _MAX_TOKEN_ID:
        raise RejectError(f"input_ids must lie between 0 and {_MAX_TOKEN_ID}")
    scored = 0
    for position, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        if label == NOT_SCORED:
            continue
        if label != token:
            raise RejectError(f"labels[{position}] is neither {NOT_SCORED} nor equal to input_ids[{position}]")
        scored += 1
    if not scored:
        raise RejectError(f"every label is {NOT_SCORED}: there is nothing to score")
    return input_ids, labels


def _integers(values: Any, where: str) -> tuple[int, ...]:
    if not isinstance(values, list | tuple):
        raise RejectError(f"{where} is {_kind(values)}, it must be a list of integers")
    if set(map(type, values)) - {int}:
        position = next(position for position, value in enumerate(values) if type(value) is not int)
        raise RejectError(f"{where}[{position}] is {_kind(values[position])}, it must be an integer")
    return tuple(values)


def _messages(values: Any, where: str, roles: dict[str, str] = _ROLES) -> tuple[Message, ...]:
    if not isinstance(values, list | tuple):
        raise RejectError(f"{where} is {_kind(values)}, it must be a list of messages")
    if not values:
        raise RejectError(f"{where} is empty")
    return tuple(_message(value, f"{where}[{index}]", roles) for index, value in enumerate(values))


def _message(value: Any, where: str, roles: dict[str, str]) -> Message:
    if not isinstance(value, dict):
        raise RejectError(f"{where} is {_kind(value)}, it must be a message")
    role_name, content_name = ("from", "value") if roles is _SHAREGPT_ROLES and "from" in value else ("role", "content")
    for name in (role_name, content_name):
        if name not in value:
            raise RejectError(f"{where} has no {name}")
    role = value[role_name]
    if not isinstance(role, str):
        raise RejectError(f"{where}.{role_name} is {_kind(role)}, it must be a string")
    if role not in roles:
        raise RejectError(f"{where}.{role_name} {_shown(role)} is unknown; known are {', '.join(roles)}")
    role = roles[role]
    for name in ("tool_calls", "function_call"):
        if value.get(name):
            raise RejectError(f"{where}.{name} cannot be scored; write the call into the content")

    content = value[content_name]
    if role != "assistant":
        return {"role": role, "content": _content(content, f"{where}.{content_name}")}
    # An answer may be all reasoning, with null for content; if there is none either, the turn is rejected as empty.
    content = "" if content is None else _content(content, f"{where}.{content_name}")
    return {"role": role, "content": _fold_reasoning(_reasoning(value, where), content)}


def _content(content: Any, where: str) -> str:
    if not isinstance(content, list | tuple):
        return _text(content, where)
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            raise RejectError(f"{where}[{index}] is {_kind(part)}, it must be a text part")
        if part.get("type") != "text":
            raise RejectError(f"{where}[{index}] is of type {_shown(part.get('type'))}; only text parts can be scored")
        texts.append(_text(part.get("text"), f"{where}[{index}].text"))
    return "".join(texts)


def _reasoning(message: dict[str, Any], where: str) -> str:
    reasoning = message.get("reasoning_content")
    if reasoning is not None:
        return _text(reasoning, f"{where}.reasoning_content")
    for name in ("reasoning", "thinking"):
        # Other producers put objects or flags under these names.
        if isinstance(message.get(name), str):
            return _text(message[name], f"{where}.{name}")
    return ""


def _fold_reasoning(reasoning: str, content: str) -> str:
    if not reasoning.strip():
        return content
    # Some exports give the reasoning twice: in the content and on its own.
    if content.lstrip().startswith("<think>") and reasoning.strip() in content:
        return content
    return f"<think>\n{reasoning}\n</think>\n\n{content}"


def _check_turns(messages: tuple[Message, ...]) -> int:
    """Return the index of the first assistant turn; all of them must say something."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise RejectError("there is no assistant turn")
    for index in turns:
        if not messages[index]["content"].strip():
            raise RejectError(f"the assistant turn at message {index} is empty")
    return turns[0]


def _text(value: Any, where: str) -> str:
    """Return ``value`` if it is a string that UTF-8 can carry."""
    if not isinstance(value, str):
        raise RejectError(f"{where} is {_kind(value)}, it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RejectError(f"{where} holds a lone surrogate, U+{ord(value[error.start]):04X}") from None
    return value


def _extra(columns: dict[str, Any]) -> dict[str, Any]:
    """Return the unknown columns; a null column of a form that was not used says nothing and is left out."""
    return {
        _column_name(name): _json_value(value, name, _MAX_DEPTH)
        for name, value in columns.items()
        if value is not None or name not in _FORM_COLUMNS
    }


def _column_name(name: Any) -> str:
    return _text(name, f"the column name {_shown(name)}")


def _json_value(value: Any, column: str, depth: int) -> Any:
    """Return ``value`` as strict JSON can carry it: no NaN or infinity, no lone surrogate, no Python object."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _text(value, f"column {_shown(column)}")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not depth:
        raise RejectError(f"column {_shown(column)} is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, list | tuple):
        return [_json_value(item, column, depth - 1) for item in value]
    if isinstance(value, dict):
        return {_column_name(name): _json_value(item, column, depth - 1) for name, item in value.items()}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise RejectError(f"column {_shown(column)} holds a {type(value).__name__}, which JSON cannot carry")


def _what_is_missing(columns: dict[str, Any]) -> str:
    for name, partner in (("prompt", "completion or response"), ("input_ids", "labels")):
        if columns.get(name) is not None:
            return f"there is {name} but no {partner}"
    nulls = [name for name in _FORM_COLUMNS if name in columns and columns[name] is None]
    if nulls:
        return f"{nulls[0]} is null"
    return "there is neither messages, nor conversations, nor prompt and completion, nor input_ids and labels"


def _message_fields(messages: Sequence[Message]) -> list[bytes]:
    return [message[name].encode() for message in messages for name in ("role", "content")]


def _packed(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)


def _shown(value: Any) -> str:
    """Return a short form of pool text that is safe on a terminal: repr escapes whatever is not printable."""
    if not isinstance(value, str):
        return _kind(value)
    return repr(value if len(value) <= 40 else value[:40] + "...")


def _kind(value: Any) -> str:
    """Return what JSON would call the value."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")
