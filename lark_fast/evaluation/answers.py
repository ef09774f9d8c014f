"""Which part of a text is its answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

THINK, THOUGHT = "<think>", "</think>"
LONGEST = 1_000  # characters of an answer
EMPTY, UNFINISHED, NONE, TOO_LONG = (
    "nothing was written",
    "the thoughts never end",
    "no answer",
    f"the answer is longer than {LONGEST:,} characters",
)

_MARKED = 4_000  # characters at the end of a text in which it may say what its answer is
_BOX = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*(?:\{|(?P<bare>\\?[A-Za-z]+|[-+]?[\d.,]+|[^\s{])))|\\.|[{}]", re.DOTALL)
_EMPHASIS = r"[*_`\s]*"
_MARKS = [
    re.compile(r"^\s*####\s*(?P<answer>\S.*)$", re.MULTILINE),
    re.compile(
        rf"^{_EMPHASIS}(?:the\s+)?(?:(?:final|correct|right)\s+)?answer{_EMPHASIS}[:=]{_EMPHASIS}"
        rf"(?:(?:\\\[|\$\$){_EMPHASIS})?(?P<answer>[^\s*_`].*)$",
        re.MULTILINE | re.IGNORECASE,
    ),
]
_SHORT_MARK = re.compile(rf"^{_EMPHASIS}A{_EMPHASIS}:(?P<answer>.+)$", re.MULTILINE)  # where A is no option
_SENTENCE = re.compile(
    r"\b(?:answer|(?:correct|right|best)\s+(?:option|choice))(?:\s+to\s+[^.\n:]{1,80})?\s+is(?=\W)\s*:?"
    r"(?P<answer>[^\n]+?)(?=\.\s|,\s+[A-Za-z]{2}|\s(?:because|since|as)\s|$)",
    re.MULTILINE | re.IGNORECASE,
)
_SET_OFF = re.compile(r"^[*_`\s]+|[*_`\s.]+$")
_NAMED = r"(?:(?:option|choice) )?[(\[]?"
_ONLY_LETTER = re.compile(rf"^{_NAMED}(?P<letter>[a-z])[)\]]?[.,:;]?$", re.IGNORECASE)
_LETTER_FIRST = re.compile(
    rf"^{_NAMED}(?P<letter>[A-Z])(?: ?[)\].:]+|(?= [-\u2013\u2014] )|(?=,? (?:because|since|as)\b))(?P<rest>.*)$",
    re.IGNORECASE,
)
# "(A) or (B)" names neither.
_ANOTHER = re.compile(r"^ ?(?:(?:[,;/&]|,? ?(?:or|and)\b) ?[(\[]?[A-Z](?:[)\].:]|$)|[(\[][A-Z][)\]])", re.IGNORECASE)
_LETTER_LINE = re.compile(r"^[\s*_(\[]*(?P<letter>[A-Z])[\s*_)\].:]*$", re.MULTILINE)
_SET = re.compile(r"\\(?:text|math)(?:bf|rm|sf|tt|it)?\s*\{([^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An answer as it stands in a text.

    Attributes:
        answer: "" where there is none.
        fault: why there is none, else "".
        marked: the text itself says that this is its answer.
    """

    answer: str = ""
    fault: str = ""
    marked: bool = True


def find_answer(text: str, *, thinking: bool = False, lettered: bool = False) -> Found:
    """The last thing that a text gives as its answer, outside of its thoughts.

    A box (``\\boxed{...}``) goes before a marked answer (``#### 5``, ``Answer: 5``, "the answer is 5"), and this before
    the text itself, which is then all there is to look for an answer in (not ``marked``). Only the last box counts, so
    that nobody gains by writing several.

    Args:
        text: what a model wrote.
        thinking: the prompt had opened its thoughts.
        lettered: A is the name of an option, not short for "answer".
    """
    if not text.strip():
        return Found(fault=EMPTY)
    said = behind_thoughts(text, thinking=thinking)
    if said is None:
        return Found(fault=UNFINISHED)
    if not said.strip():
        return Found(fault=NONE)
    box = last_box(said)
    if box is not None:
        return _bounded(box)
    end = said[-_MARKED:]
    for mark in [*([] if lettered else [_SHORT_MARK]), *_MARKS, _SENTENCE]:
        marked = _last(mark, end)
        if marked:
            # "A: She sells 9 eggs. The answer is 18."
            return _bounded(_SET_OFF.sub("", _last(_SENTENCE, marked) or marked))
    return Found(answer=said[-LONGEST:].strip(), marked=False)


def has_answered(text: str, *, thinking: bool) -> bool:
    """Whether a text holds a complete box outside of its thoughts: what comes after it is no longer the answer."""
    said = behind_thoughts(text, thinking=thinking)
    return said is not None and last_box(said) is not None


def behind_thoughts(text: str, *, thinking: bool) -> str | None:
    """What is said once the thoughts are over; None where they never end."""
    _, ended, said = text.rpartition(THOUGHT)
    if ended:
        return None if THINK in said else said
    return None if thinking or THINK in text else text


def last_box(text: str) -> str | None:
    """What stands in the complete box that is closed last; braces in it are matched, ``\\{`` and ``\\}`` are none."""
    found, opened = None, []  # where each open brace's content begins, None where it is no box's
    for part in _BOX.finditer(text):
        if part["bare"]:
            found = part["bare"]
        elif part["box"] or part[0] == "{":
            opened.append(part.end() if part["box"] else None)
        elif part[0] == "}" and opened:
            start = opened.pop()
            if start is not None:
                found = text[start : part.start()].strip()
    return found


def letter_of(found: Found, choices: Sequence[str]) -> str:
    """The option that an answer names, by its letter or its text; "" where it names none.

    Args:
        found: an answer.
        choices: the options' texts in their order, where they are known.
    """
    known = [chr(ord("A") + place) for place in range(len(choices) or 26)]
    said = unset(found.answer).strip("{} ")
    named = _ONLY_LETTER.match(said) if found.marked else None
    first = None if named else _LETTER_FIRST.match(said)
    if not found.marked:
        letter = _last(_LETTER_LINE, found.answer, group="letter")
        if letter:
            return letter if letter in known else ""
        # A text that repeats the options names none: only a letter and its option, and nothing else, counts.
        if first is None or _option(first["rest"], choices, known) != first["letter"].upper():
            return ""
    elif first is not None and _ANOTHER.match(first["rest"]):
        return ""
    named = named or first
    if named and named["letter"].upper() in known:
        return named["letter"].upper()
    return _option(said, choices, known)


def _option(said: str, choices: Sequence[str], known: Sequence[str]) -> str:
    """The letter of the one option whose text is this, else ""."""
    same = [letter for letter, choice in zip(known, choices, strict=False) if _plain(choice) == _plain(said)]
    return same[0] if len(same) == 1 else ""


def _last(mark: re.Pattern, text: str, *, group: str = "answer") -> str:
    """What the last match holds, "" where there is none."""
    return next((match[group] for match in reversed(list(mark.finditer(text)))), "")


def unset(text: str) -> str:
    """A text without what only sets it: fonts, dollars, stars; blanks are single."""
    return re.sub(r"(?:[\s$*_`~]|\\(?![A-Za-z]))+", " ", _SET.sub(r"\1", text)).strip()


def _plain(text: str) -> str:
    """The same without stops and case."""
    return re.sub(r"[\s\\.,;:]+", " ", unset(text)).strip().casefold()


def _bounded(answer: str) -> Found:
    if len(answer) > LONGEST:
        return Found(fault=TOO_LONG)
    return Found(answer=answer.strip()) if answer.strip() else Found(fault=NONE)
