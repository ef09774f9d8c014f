"""Whether one answer is another: what runs in a process that can be killed, for some expressions have no end."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lark_fast.evaluation.answers import NONE, Found, find_answer, letter_of, unset

MATH, CHOICE = "math", "choice"
UNREADABLE = "the answer cannot be read"
# "18 dollars", "$5 per hour", where math-verify would multiply letters; "5xy" and "5 xy" are products.
_COUNTED = re.compile(r"^[^A-Za-z\\]*\d[\d,./]*\s+(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z'.\s-]+$")
_PROSE = re.compile(r"^[A-Za-z']{2,},?\s+[A-Za-z'][^\\^{}]*\d")  # "She makes 9 * 2 = $18 a day"
_WORDS = re.compile(r"^[A-Za-z]{4,}(?: [A-Za-z]+)*$")  # math-verify would multiply their letters
# "4 million", "at least 5", "4 and a half"; commands such as \times are none of them.
_OTHERWISE = re.compile(
    r"(?<![\\A-Za-z])(?:hundred|thousand|million|billion|trillion|dozen|half|halves|thirds?|quarters?|squared|cubed|plus|"
    r"minus|times|not?|cannot|never|at (?:least|most)|(?:less|more|greater|fewer|smaller|larger) than|or (?:more|less))"
    r"(?![A-Za-z])",
    re.IGNORECASE,
)
_END = re.compile(r"(?:[.,;\s]|\\\\)+$")
_SMALL = 1e-3  # below it six decimals are too few
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
        correct = value is not None and equal(right, value)
        verdicts.append(Verdict(correct=correct, answer=found.answer, fault=found.fault))
        vote = None
        if value is not None:
            # All right answers are one: 50 % is 50 and 0.5, which does not make these equal.
            same = (other is right if correct else other is not right and equal(other, value) for other in ballots)
            vote = next((number for number, alike in enumerate(same) if alike), len(ballots))
            value = right if correct else value
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
    """What an answer stands for, read as a whole: a part of it, as the 2 of 2\\sqrt{3}, must never count for it.

    Words, and numbers of which words say something else, stand for their text alone.
    """
    answer = _END.sub("", answer.replace("~", " "))  # a blank that math-verify does not know
    words = unset(answer)
    if _WORDS.match(words) or (_OTHERWISE.search(words) and any(map(str.isdigit, words))):
        return [words.casefold()]
    if _PROSE.match(answer):
        numbers = _NUMBER.findall(answer.rpartition("=")[2])
        return _parsed(numbers[0], boxed=True) if len(numbers) == 1 else [words.casefold()]
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

    return bool(verify(one, other, timeout_seconds=None)) and not _differ_in_digits(one, other)


def _differ_in_digits(one: list[object], other: list[object]) -> bool:
    """Small numbers are compared by their digits: math-verify rounds both to six decimals."""
    from sympy import Expr

    heads = [values[0] for values in (one, other) if values]
    if len(heads) < 2 or not all(isinstance(head, Expr) and head.is_number and head.is_real for head in heads):
        return False
    a, b = map(float, heads)
    return 0 < abs(a) < _SMALL and abs(a - b) > 1e-3 * abs(a)
