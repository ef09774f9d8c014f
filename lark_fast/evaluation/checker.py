"""Whether one answer is another: what runs in a process that can be killed, for some expressions have no end."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lark_fast.evaluation.answers import NONE, Found, find_answer, letter_of

MATH, CHOICE = "math", "choice"
UNREADABLE = "the answer cannot be read"
# "18 dollars", "$5 per hour", where math-verify would multiply letters; "5xy" and "5 xy" are products.
_COUNTED = re.compile(r"^[^A-Za-z\\]*\d[\d,./]*\s+(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z'.\s-]+$")
_SENTENCE = re.compile(r"^[A-Za-z']{2,},?\s+[A-Za-z'][^\\^{}]*\d")  # "She makes 9 * 2 = $18 a day"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What a model wrote.

    Attributes:
        thinking: the prompt had opened its thoughts.
        cut: it was ended from outside, so that its last number may be anything.
    """

    text: str
    thinking: bool = False
    cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an answer is worth.

    Attributes:
        answer: as it was found, "" where there is none.
        fault: why it could not be right, "" where it could.
    """

    correct: bool
    answer: str = ""
    fault: str = ""


def check(
    kind: str, gold: str, choices: Sequence[str], texts: Sequence[Text]
) -> tuple[list[Verdict], list[int | None]]:
    """Judge a problem's texts.

    Mathematics is compared by math-verify: equal as sets, intervals, matrices, equations and numbers to six decimals;
    a percentage is right as 50 and as 0.5; units are left out. Options are compared by their letter.

    Args:
        kind: "math" or "choice".
        gold: the right answer; of a choice, its letter.
        choices: the options' texts.
        texts: n of them.

    Returns:
        n verdicts, and n votes: texts that answer the same have the same number; None where there is no answer.
    """
    read = _letter if kind == CHOICE else _mathematics
    equal = _same_letter if kind == CHOICE else _same_value
    right = [gold] if kind == CHOICE else _value(gold)
    verdicts: list[Verdict] = []
    votes: list[int | None] = []
    ballots: list[object] = []
    for text in texts:
        found, value = read(text, choices)
        verdicts.append(
            Verdict(correct=value is not None and equal(right, value), answer=found.answer, fault=found.fault)
        )
        vote = None
        if value is not None:
            vote = next((number for number, other in enumerate(ballots) if equal(other, value)), len(ballots))
            if vote == len(ballots):
                ballots.append(value)
        votes.append(vote)
    return verdicts, votes


def _letter(text: Text, choices: Sequence[str]) -> tuple[Found, list[str] | None]:
    found = find_answer(text.text, thinking=text.thinking, lettered=True)
    letter = "" if found.fault else letter_of(found, choices)
    if not letter:
        return Found(fault=found.fault or NONE), None
    return Found(answer=letter), [letter]


def _mathematics(text: Text, _: Sequence[str]) -> tuple[Found, list[object] | None]:
    found = find_answer(text.text, thinking=text.thinking)
    if found.fault:
        return found, None
    if found.marked:
        value = _value(found.answer)
        return (found, value) if value else (Found(answer=found.answer, fault=UNREADABLE), None)
    if text.cut:
        return Found(fault=NONE), None
    value = _parsed(found.answer, boxed=False)
    return (Found(answer=str(value[-1])), value) if value else (Found(fault=NONE), None)


def _same_letter(one: list[str], other: list[str]) -> bool:
    return one == other


def _value(answer: str) -> list[object]:
    """What an answer stands for, read as a whole: a part of it, as the 2 of 2\\sqrt{3}, must never count for it."""
    answer = answer.replace("~", " ")  # a blank that math-verify does not know
    if _SENTENCE.match(answer):
        return _parsed(_NUMBER.findall(answer)[-1], boxed=True)
    return _parsed(answer, boxed=not _COUNTED.match(answer))


def _parsed(answer: str, *, boxed: bool) -> list[object]:
    """An answer as math-verify reads it: values that stand for it, and at last its text.

    Args:
        answer: of the last 1,000 characters of a text at most.
        boxed: it is one expression, else there is one in it.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    forms = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    text = "\\boxed{" + answer + "}" if boxed else answer
    # The process that this runs in has a limit of its own, for all of it.
    return parse(text, forms, parsing_timeout=None)


def _same_value(one: list[object], other: list[object]) -> bool:
    from math_verify import verify

    return bool(verify(one, other, timeout_seconds=None))
