"""The embedded pool: arithmetic word problems, each answered by several teachers of different manners.

Everything is made from a seed: no file, no download. A problem is a chain of steps on a running number; a teacher turns
the chain into text. Two of the teachers make mistakes, as real ones do.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

NAMES = ["Ada", "Ben", "Chen", "Dana", "Emre", "Femi", "Gita", "Hugo", "Ines", "Jun", "Kofi", "Lena", "Mona", "Nils"]
THINGS = ["apples", "books", "coins", "shells", "stamps", "marbles", "pencils", "tickets", "beads", "cards"]
SYSTEM = "Solve the problem and end with a line of the form 'A: <number>'."


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on the running number: ``before op amount = after``."""

    sign: str  # "+", "-" or "*"
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


def make_problem(rng: random.Random) -> Problem:
    """A problem of two or three steps."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    value = start = rng.randint(3, 20)
    steps = []
    for _ in range(rng.choice([2, 2, 3])):
        sign = rng.choice("++-*" if 5 < value < 25 else "+-" if value >= 25 else "++*")
        amount = {"+": rng.randint(2, 15), "-": rng.randint(1, max(1, min(value - 1, 12))), "*": rng.randint(2, 4)}[
            sign
        ]
        after = {"+": value + amount, "-": value - amount, "*": value * amount}[sign]
        sentence = {
            "+": rng.choice([f"A friend gives {name} {amount} more.", f"Then {name} finds {amount} more."]),
            "-": rng.choice([f"{name} loses {amount} of them.", f"Then {name} gives {amount} away."]),
            "*": rng.choice(
                [f"By the next week there are {amount} times as many.", f"Then the number grows {amount}-fold."]
            ),
        }[sign]
        steps.append(Step(sign, value, amount, after, sentence))
        value = after
    told = " ".join(step.sentence for step in steps)
    return Problem(f"{name} has {start} {thing}. {told} How many {thing} does {name} have now?", start, tuple(steps))


def _stepwise(problem: Problem, rng: random.Random) -> str:
    lines = [f"Step {i}: {s.before} {s.sign} {s.amount} = {s.after}." for i, s in enumerate(problem.steps, 1)]
    return "\n".join([*lines, f"A: {problem.answer}"])


def _terse(problem: Problem, rng: random.Random) -> str:
    return "; ".join(f"{s.before}{s.sign}{s.amount}={s.after}" for s in problem.steps) + f"\nA: {problem.answer}"


def _thinker(problem: Problem, rng: random.Random) -> str:
    thoughts = [f"I start with {problem.start}."]
    for s in problem.steps:
        thoughts.append(f'The text says "{s.sentence}" So I take {s.before} {s.sign} {s.amount}, which is {s.after}.')
        if rng.random() < 0.3:
            thoughts.append(f"Wait, is that right? {s.before} {s.sign} {s.amount} = {s.after}. Yes.")
    return "<think>\n" + "\n".join(thoughts) + f"\n</think>\n\nThere are {problem.answer} now.\nA: {problem.answer}"


def _chatty(problem: Problem, rng: random.Random) -> str:
    opening = rng.choice(["Great question!", "Happy to help with this one.", "Let us look at this together."])
    words = {"+": "adding", "-": "taking away", "*": "multiplying by"}
    middle = " ".join(f"From {s.before}, {words[s.sign]} {s.amount} leaves us with {s.after}." for s in problem.steps)
    return f"{opening} {middle} {rng.choice(['And that is it!', 'Quite simple.', 'Done.'])}\nA: {problem.answer}"


def _hasty(problem: Problem, rng: random.Random) -> str:
    """Writes like the stepwise teacher and slips in about every third problem."""
    wrong = rng.randrange(len(problem.steps)) if rng.random() < 0.35 else -1
    value, lines = problem.start, []
    for i, s in enumerate(problem.steps):
        after = {"+": value + s.amount, "-": value - s.amount, "*": value * s.amount}[s.sign]
        after += rng.choice([-2, -1, 1, 2, 10]) if i == wrong else 0
        lines.append(f"Step {i + 1}: {value} {s.sign} {s.amount} = {after}.")
        value = after
    return "\n".join([*lines, f"A: {value}"])


def _guesser(problem: Problem, rng: random.Random) -> str:
    guess = problem.answer + (0 if rng.random() < 0.4 else rng.randint(-9, 9))
    return f"{rng.choice(['My guess', 'Probably', 'It should be about'])}: {guess}\nA: {guess}"


TEACHERS: dict[str, Callable[[Problem, random.Random], str]] = {
    "stepwise": _stepwise,
    "terse": _terse,
    "thinker": _thinker,
    "chatty": _chatty,
    "hasty": _hasty,
    "guesser": _guesser,
}


def make_pool(problems: int, *, seed: int, prefix: str) -> Iterator[dict[str, Any]]:
    """Records of a pool: every teacher's answer to each of ``problems`` problems.

    Args:
        problems: how many.
        seed: of the problems and of the teachers' moods.
        prefix: begins every problem_id, so that two pools never share one.
    """
    rng = random.Random(seed)
    for number in range(problems):
        problem = make_problem(rng)
        for candidate, (teacher, write) in enumerate(TEACHERS.items()):
            text = write(problem, rng)
            yield {
                "problem_id": f"{prefix}-{number:04d}",
                "candidate_id": candidate,
                "teacher": teacher,
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": problem.question},
                    {"role": "assistant", "content": text},
                ],
                "correct": text.endswith(f"A: {problem.answer}"),
            }
