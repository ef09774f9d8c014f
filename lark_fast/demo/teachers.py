"""The teachers, and the conversations they leave: those that the student is schooled on, and pools.

As in the paper, a pool holds several strong teachers' answers to every problem: all show their working, and all but one
are always right. They differ in what a selection can go by: how many words they spend, how they work a sum out, and how
familiar their manner is to the student. ``Teacher.lessons`` sets the last. The student has met every manner before, as
a pretrained model has, but some seldom. With a manner that it has never met its nll is 5 to 8 nats a token, which no
model has on plain prose, and a selection by nll or Brier score would be about nothing else.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lark_fast.demo.problems import Problem, apply


@dataclass(frozen=True, slots=True)
class Teacher:
    """A way to answer."""

    write: Callable[[Problem, random.Random], str]  # -> the answer's text, which ends in "A: <number>"
    lessons: int  # of 16 school problems, how many are answered in this manner


def _stepwise(problem: Problem, rng: random.Random) -> str:
    lines = [f"Step {i}: {s.before} {s.sign} {s.amount} = {s.after}." for i, s in enumerate(problem.steps, 1)]
    return "\n".join([*lines, f"A: {problem.answer}"])


def _terse(problem: Problem, rng: random.Random) -> str:
    return "; ".join(f"{s.before}{s.sign}{s.amount}={s.after}" for s in problem.steps) + f"\nA: {problem.answer}"


def _chatty(problem: Problem, rng: random.Random) -> str:
    opening = rng.choice(["Great question!", "Happy to help with this one.", "Let us look at this together."])
    words = {"+": "adding", "-": "taking away"}
    middle = " ".join(f"From {s.before}, {words[s.sign]} {s.amount} leaves us with {s.after}." for s in problem.steps)
    return f"{opening} {middle} {rng.choice(['And that is it!', 'Quite simple.', 'Done.'])}\nA: {problem.answer}"


def _thinker(problem: Problem, rng: random.Random) -> str:
    thoughts = [f"I start with {problem.start}."]
    for s in problem.steps:
        thoughts.append(f'The text says "{s.sentence}" So I take {s.before} {s.sign} {s.amount}, which is {s.after}.')
        if rng.random() < 0.3:
            thoughts.append(f"Wait, is that right? {s.before} {s.sign} {s.amount} = {s.after}. Yes.")
    return "<think>\n" + "\n".join(thoughts) + f"\n</think>\n\nThere are {problem.answer} now.\nA: {problem.answer}"


def _checker(problem: Problem, rng: random.Random) -> str:
    back = {"+": "-", "-": "+"}
    lines = [
        f"{s.before} {s.sign} {s.amount} = {s.after}, since {s.after} {back[s.sign]} {s.amount} = {s.before}."
        for s in problem.steps
    ]
    return "\n".join([*lines, f"A: {problem.answer}"])


def _counter(problem: Problem, rng: random.Random) -> str:
    """Needs no sums by heart: counts up or down to each."""
    lines = []
    for s in problem.steps:
        way = 1 if s.sign == "+" else -1
        counted = ", ".join(str(number) for number in range(s.before + way, s.after + way, way))
        lines.append(f"{s.before} {s.sign} {s.amount}: count {counted}.")
    return "\n".join([*lines, f"A: {problem.answer}"])


def _hasty(problem: Problem, rng: random.Random) -> str:
    """Slips in about every seventh problem and goes on from the wrong number, as strong teachers do too."""
    wrong = rng.randrange(len(problem.steps)) if rng.random() < 0.15 else None
    value, parts = problem.start, []
    for i, s in enumerate(problem.steps):
        after = apply(s.sign, value, s.amount) + (rng.choice([-2, -1, 1, 2]) if i == wrong else 0)
        parts.append(f"{value} {'and' if s.sign == '+' else 'less'} {s.amount} makes {after}")
        value = after
    return ", ".join(parts) + f".\nA: {value}"


TEACHERS = {
    "stepwise": Teacher(_stepwise, 8),
    "terse": Teacher(_terse, 2),
    "chatty": Teacher(_chatty, 2),
    "thinker": Teacher(_thinker, 1),
    "checker": Teacher(_checker, 1),
    "counter": Teacher(_counter, 1),
    "hasty": Teacher(_hasty, 1),
}


def make_school(problems: Sequence[Problem], rng: random.Random) -> Iterator[dict[str, Any]]:
    """One answer to each problem, in a manner drawn by ``lessons``."""
    manners = rng.choices(list(TEACHERS), [teacher.lessons for teacher in TEACHERS.values()], k=len(problems))
    for number, (problem, teacher) in enumerate(zip(problems, manners, strict=True)):
        yield _record(f"school-{number:04d}", 0, teacher, problem, rng)


def make_pool(problems: Sequence[Problem], rng: random.Random, *, prefix: str) -> Iterator[dict[str, Any]]:
    """Every teacher's answer to each problem; ``prefix`` begins every problem_id."""
    for number, problem in enumerate(problems):
        for candidate, teacher in enumerate(TEACHERS):
            yield _record(f"{prefix}-{number:04d}", candidate, teacher, problem, rng)


def ask(problem: Problem) -> list[dict[str, str]]:
    """The messages that put a problem to a student."""
    return [{"role": "user", "content": problem.question}]


def _record(problem_id: str, candidate: int, teacher: str, problem: Problem, rng: random.Random) -> dict[str, Any]:
    text = TEACHERS[teacher].write(problem, rng)
    return {
        "problem_id": problem_id,
        "candidate_id": candidate,
        "teacher": teacher,
        "messages": [*ask(problem), {"role": "assistant", "content": text}],
        "correct": problem.is_solved_by(text),
    }
