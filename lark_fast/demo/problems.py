"""Arithmetic word problems, made from a seed: no file, no download.

A problem is a chain of steps on a running number. No number exceeds ``LARGEST`` and there is no multiplication, so that
the few hundred facts there are to learn fit a student that has a minute of schooling.
"""

import random
from dataclasses import dataclass

NAMES = ["Ada", "Ben", "Chen", "Dana", "Emre", "Femi", "Gita", "Hugo", "Ines", "Jun", "Kofi", "Lena", "Mona", "Nils"]
THINGS = ["apples", "books", "coins", "shells", "stamps", "marbles", "pencils", "tickets", "beads", "cards"]
LARGEST = 12


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on the running number: ``before sign amount = after``."""

    sign: str  # "+" or "-"
    before: int
    amount: int
    after: int
    sentence: str  # how the question tells it


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and the chain of steps that answers it."""

    question: str
    start: int
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        """The number that is asked for."""
        return self.steps[-1].after

    def is_solved_by(self, text: str) -> bool:
        """Whether a text ends in ``A: `` and exactly the answer."""
        return text.rsplit("A: ", 1)[-1].strip() == str(self.answer)


def make_problems(count: int, rng: random.Random) -> list[Problem]:
    """``count`` problems, no question twice: whatever way the list is cut, no part has seen a question of another."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = _make_problem(rng)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def apply(sign: str, before: int, amount: int) -> int:
    """``before sign amount``."""
    return before + amount if sign == "+" else before - amount


def _make_problem(rng: random.Random) -> Problem:
    """A problem of two or three steps; amounts are 2 to 9, results 1 to ``LARGEST``."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    value = start = rng.randint(2, 9)
    steps = []
    for _ in range(rng.choice([2, 3])):
        room = {"+": LARGEST - value, "-": value - 1}
        sign = rng.choice([sign for sign in room if room[sign] >= 2])
        amount = rng.randint(2, min(9, room[sign]))
        sentence = rng.choice(
            {
                "+": [f"{name} gets {amount} more.", f"Then {name} finds {amount} more."],
                "-": [f"{name} loses {amount}.", f"Then {name} gives {amount} away."],
            }[sign]
        )
        steps.append(Step(sign, value, amount, apply(sign, value, amount), sentence))
        value = steps[-1].after
    told = " ".join(step.sentence for step in steps)
    return Problem(f"{name} has {start} {thing}. {told} How many {thing} now?", start, tuple(steps))
