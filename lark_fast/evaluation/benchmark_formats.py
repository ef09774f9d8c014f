"""The fields of one problem, under the names that benchmarks give them, become what is asked and what is right."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lark_fast.errors import RejectError
from lark_fast.evaluation.answers import last_box
from lark_fast.evaluation.checker import CHOICE, MATH
from lark_fast.hashing import hash_fields
from lark_fast.rendering.inspection import visible

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_QUESTIONS = ("messages", "problem", "question", "prompt")
_ANSWERS = ("answer", "correct_answer", "solution")
_OPTIONS = ("options", "choices")
_IDS = ("problem_id", "unique_id", "record_id", "question_id", "id")
_GROUPS = ("level", "high_level_domain", "domain", "category")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHOWN_FIELDS = 12

_FINAL = "####"
_LEVEL = re.compile(r"^level\s+", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Z])\)?\.?")
# Options that stand in the question itself: one a line, else all of them in brackets.
_OPTION_MARKS = (
    re.compile(
        r"^[ \t]*(?:[-*][ \t]+)?(?:\*\*)?[(\[]?(?P<letter>[A-Z])(?:[)\]:](?:\*\*)?|\.(?:\*\*)?[ \t])[ \t]*(?=\S)",
        re.MULTILINE | re.IGNORECASE,
    ),
    re.compile(r"(?<!\S)\((?P<letter>[A-Z])\)\s*(?=\S)", re.IGNORECASE),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One problem of a benchmark, before it is put to a model."""

    problem_id: str | None  # None: the file gives none
    text: str  # the question; of messages, the user's last turn
    messages: tuple[dict[str, str], ...]  # () where the file gives a text only
    kind: str  # MATH or CHOICE
    answer: str  # of a choice, its letter
    choices: tuple[str, ...]
    listed: bool  # the question shows its options itself
    group: str


def parse_item(raw: Mapping[str, Any], *, seed: int) -> Item:
    """Find question, answer, options and group among a problem's fields.

    Names count without regard to case, and "Correct Answer" is "correct_answer". Known are the fields of MATH and
    MATH-500, AIME, AMC, GSM8K, GPQA (with its options in columns or in the question), MMLU and MMLU-Pro, ARC, and our
    own.

    Args:
        raw: the fields.
        seed: of the order of GPQA's options, which is drawn for each problem from this and its id.

    Raises:
        RejectError: something is missing or not as it should be; the message says what.
    """
    fields = _normalised(raw)
    problem_id = _problem_id(fields)
    text, messages = _question(fields)
    kind, listed = CHOICE, bool(messages)
    options = next((name for name in _OPTIONS if fields.get(name)), None)
    if "incorrect_answer_1" in fields:
        choices, answer = _shuffled(fields, seed, problem_id or text)
    elif options is not None:
        choices, answer = _options(fields, options)
    else:
        answer, listed = _gold(fields), True
        choices = _choices_in_question(text, answer)
        kind = CHOICE if choices else MATH
    return Item(
        problem_id=problem_id,
        text=text,
        messages=messages,
        kind=kind,
        answer=_LETTER.fullmatch(answer)[1] if kind == CHOICE else answer,
        choices=choices,
        listed=listed,
        group=_group(fields),
    )


def _normalised(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that are not null; of two whose names differ in case only, the first."""
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        if value is not None:
            fields.setdefault(re.sub(r"\W+", "_", str(name).strip().casefold()), value)
    return fields


def _problem_id(fields: Mapping[str, Any]) -> str | None:
    for name in _IDS:
        value = fields.get(name)
        if isinstance(value, str):
            if not value.strip():
                raise RejectError(f"{name} is empty; fill it in, or leave the field out everywhere")
            return _text(value, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _number(value, name)
        if value is not None:
            raise RejectError(f"{name} must be a text or a number")
    return None


def _question(fields: Mapping[str, Any]) -> tuple[str, tuple[dict[str, str], ...]]:
    # A problem's number can go by the name of problem.
    name = next((name for name in _QUESTIONS if isinstance(fields.get(name), str | list)), None)
    if name is None:
        raise RejectError(f"no question: looked for a text in {', '.join(_QUESTIONS)}; found {_names(fields)}")
    value = fields[name]
    if isinstance(value, str):
        if not value.strip():
            raise RejectError(f"{name} is empty; it must hold the question")
        return _text(value, name).strip(), ()
    if not value:
        raise RejectError(f"{name} is an empty list; it must hold the question")
    messages = tuple(_message(turn, f"{name}[{place}]") for place, turn in enumerate(value))
    last = messages[-1]
    if last["role"] == "assistant":
        raise RejectError(f"{name} end with an assistant's turn ({name}[{len(messages) - 1}]); leave it to the model")
    if last["role"] != "user":
        raise RejectError(f"{name} end with a turn of the role {last['role']}; the last must be the user's")
    return last["content"], messages


def _message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise RejectError(f"{where} is no message with role and content")
    role, content = turn.get("role"), turn.get("content")
    if role not in _ROLES:
        raise RejectError(f"{where}: the role must be one of {', '.join(_ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise RejectError(f"{where}: the content must be a text")
    return {"role": role, "content": _text(content, where)}


def _gold(fields: Mapping[str, Any]) -> str:
    """The right answer as a text; of a worked solution its end: the last box, or what follows ####."""
    name = next((name for name in _ANSWERS if name in fields), None)
    if name is None:
        raise RejectError(
            f"no answer: looked for {', '.join(_ANSWERS)}; found {_names(fields)}; add one, there is no judging without"
        )
    value = fields[name]
    if isinstance(value, str):
        text = _text(value, name)
        box, (_, final, behind) = last_box(text), text.rpartition(_FINAL)
        if box is None and not final and name == "solution":
            raise RejectError("no answer: the solution has neither \\boxed{...} nor #### ...; add a field answer")
        answer = (box if box is not None else behind).strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        answer = _number(value, name)
    else:
        raise RejectError(f"{name} must be a text or a number, not {type(value).__name__}")
    if not answer:
        raise RejectError(f"{name} is empty; there is no judging without the right answer")
    return answer


def _choices_in_question(question: str, answer: str) -> tuple[str, ...]:
    """The options that a question itself shows, where the answer is the letter of one; else ()."""
    letter = _LETTER.fullmatch(answer)
    if letter is None:
        return ()
    choices = next(filter(None, (_choices_in(question, mark) for mark in _OPTION_MARKS)), ())
    if choices and LETTERS.index(letter[1]) >= len(choices):
        raise RejectError(f"the answer is {letter[1]}, but the question shows {len(choices)} options")
    return choices


def _choices_in(question: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
    """The texts behind A, B, C, ... where these follow one another, at the last place where they do."""
    marks = list(pattern.finditer(question))
    letters = [mark["letter"].upper() for mark in marks]
    if LETTERS[0] not in letters:
        return ()
    first = len(letters) - 1 - letters[::-1].index(LETTERS[0])
    follows = [found == expected for found, expected in zip(letters[first:], LETTERS, strict=False)]
    run = marks[first : first + (follows.index(False) if False in follows else len(follows))]
    if len(run) < 2:
        return ()
    texts = [question[mark.end() : behind.start()] for mark, behind in pairwise(run)]
    # What stands behind a blank line is no longer the last option's.
    last = question[run[-1].end() :].split("\n\n")[0]
    return tuple(text.strip() for text in (*texts, last))


def _shuffled(fields: Mapping[str, Any], seed: int, key: str) -> tuple[tuple[str, ...], str]:
    """GPQA's options in an order that depends on seed and problem alone, and the letter of the right one."""
    if "correct_answer" not in fields:
        raise RejectError(f"no answer: looked for correct_answer; found {_names(fields)}")
    names = ["correct_answer"]
    while (name := f"incorrect_answer_{len(names)}") in fields:
        names.append(name)
    texts = _option_texts([fields[name] for name in names], "the answers")
    seeded = (str(seed).encode(), key.encode())
    order = sorted(range(len(texts)), key=lambda place: hash_fields(*seeded, str(place).encode(), size=16))
    return tuple(texts[place] for place in order), LETTERS[order.index(0)]


def _options(fields: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], str]:
    """The options of the field ``name``, and the letter of the right one."""
    value, labels = fields[name], []
    if isinstance(value, dict):
        value, labels = value.get("text"), value.get("label")
        if not isinstance(labels, list) or not isinstance(value, list) or len(value) != len(labels):
            raise RejectError(f"{name} must be a list of texts, or hold lists text and label of one length")
    if not isinstance(value, list):
        raise RejectError(f"{name} must be a list of texts")
    texts = _option_texts(value, name)
    labels = [str(label).strip() for label in labels]
    found = [_place(fields[key], texts, labels) for key in ("answer", "answerkey") if key in fields]
    if "answer_index" in fields:
        found.append(_place(fields["answer_index"], texts, []))
    if not found:
        raise RejectError(
            f"no answer: looked for answer, answerKey, answer_index; found {_names(fields)}; "
            "add one, there is no judging without"
        )
    if len(set(found)) > 1:
        raise RejectError(f"its answers name different options, {' and '.join(LETTERS[place] for place in found)}")
    return tuple(texts), LETTERS[found[0]]


def _place(answer: Any, texts: Sequence[str], labels: Sequence[str]) -> int:
    """Which option an answer names: by label where there are any, else by place from 0 or by letter; or by text."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        said = _number(answer, "the answer")
        place = int(said) if answer == int(answer) and not labels else -1
    elif isinstance(answer, str):
        said, letter = answer.strip(), _LETTER.fullmatch(answer.strip().upper())
        # A letter behind those of the options can only be the text of one.
        place = LETTERS[: len(texts)].find(letter[1]) if letter and not labels else -1
    else:
        raise RejectError(f"the answer must be a letter, a place or a text, not {type(answer).__name__}")
    if not said:
        raise RejectError("the answer is empty; there is no judging without the right answer")
    if said in labels:
        place = labels.index(said)
    elif place < 0 and texts.count(said) == 1:
        place = texts.index(said)
    if not 0 <= place < len(texts):
        raise RejectError(f"the answer {visible(said)[:40]!r} is none of the {len(texts)} options")
    return place


def _option_texts(values: Sequence[Any], where: str) -> list[str]:
    if not 2 <= len(values) <= len(LETTERS):
        raise RejectError(f"{where}: {len(values)} options; there must be 2 to {len(LETTERS)}")
    texts = []
    for place, value in enumerate(values, 1):
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = _number(value, where)
        if not isinstance(value, str) or not value.strip():
            raise RejectError(f"{where}: option {place} is no text, or empty")
        texts.append(_text(value, where).strip())
    return texts


def _group(fields: Mapping[str, Any]) -> str:
    for name in _GROUPS:
        value = fields.get(name)
        if isinstance(value, str):
            return _LEVEL.sub("", _text(value, name).strip())
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return _number(value, name)
    return ""


def _number(value: float, where: str) -> str:
    """A number as people write it: 142.0 is 142."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RejectError(f"{where} is {value}, it must be a finite number or a text")
        if value.is_integer():
            value = int(value)
    return str(value)


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RejectError(f"{where} holds a lone surrogate, U+{ord(value[error.start]):04X}; mend the text") from None
    return value


def _names(fields: Mapping[str, Any]) -> str:
    shown = [visible(name)[:40] for name in list(fields)[:_SHOWN_FIELDS]]
    more = ", ..." if len(fields) > _SHOWN_FIELDS else ""
    return (", ".join(shown) or "nothing") + more
