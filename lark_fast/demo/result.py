"""What came of the demo: as numbers, as two tables, and in words that are computed from the numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Column, Table
from rich.text import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What training on one policy's selection did to the student. Losses are weighted means in nats a token."""

    policy: str
    label: str  # the policy, and what it chooses
    rows: int
    steps: int
    tokens: int  # scored ones, every epoch counted
    teachers: Mapping[str, float]  # share of the selection's weight
    curve: tuple[float, ...]  # loss of each step, on its batch
    training: tuple[float, float]  # loss on the selection before and after
    held_out: tuple[float, float]  # loss on what the policy selects of problems that nobody trains on
    solved: NDArray[np.bool_]  # [P] new problems, after training


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The outcomes of one run, on one student; the first policy is the one that the others are compared with."""

    solved_before: NDArray[np.bool_]  # [P]
    outcomes: Sequence[Outcome]


def relative_fall(losses: tuple[float, float]) -> float:
    """-log(after / before): the relative rate of decay, summed over the steps between. 1 is a fall by the factor e."""
    before, after = losses
    return -math.log(after / before)


def share(solved: NDArray[np.bool_]) -> tuple[float, float]:
    """Share of problems ``[P]`` that were solved, and its standard error over the choice of problems."""
    mean = float(solved.mean())
    return mean, math.sqrt(mean * (1 - mean) / len(solved))


def difference(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> tuple[float, float]:
    """Difference of two shares on the same problems ``[P]``, and its standard error: paired, so smaller than two."""
    gap = ours.astype(float) - theirs
    return float(gap.mean()), float(gap.std(ddof=1)) / math.sqrt(len(gap))


def teachers_table(outcomes: Sequence[Outcome]) -> Table:
    """A teacher a line: what share of each selection's weight it has."""
    columns = [Column(outcome.policy, justify="right") for outcome in outcomes]
    table = Table("share of the weight", *columns)
    for teacher in outcomes[0].teachers:
        table.add_row(Text(teacher), *(f"{outcome.teachers[teacher]:.0%}" for outcome in outcomes))
    return table


def result_table(result: Result) -> Table:
    """A measure a line, a policy a column."""
    outcomes = result.outcomes
    before, _ = share(result.solved_before)
    lines = [
        ("answers", [f"{o.rows:,}" for o in outcomes]),
        ("steps", [f"{o.steps:,}" for o in outcomes]),
        ("tokens trained on", [f"{o.tokens:,}" for o in outcomes]),
        ("loss, training problems", [_arrow(o.training) for o in outcomes]),
        ("  ln(before / after)", [f"{relative_fall(o.training):.2f}" for o in outcomes]),
        ("loss, held-out problems", [_arrow(o.held_out) for o in outcomes]),
        ("  ln(before / after)", [f"{relative_fall(o.held_out):.2f}" for o in outcomes]),
        ("new problems solved", [f"{before:.0%} -> {_with_error(share(o.solved))}" for o in outcomes]),
    ]
    table = Table("trained on", *(Column(o.policy, justify="right") for o in outcomes))
    for name, values in lines:
        table.add_row(name, *values)
    return table


def conclusion(result: Result) -> str:
    """One sentence: what was gained and what was not. A share differs where the gap exceeds two standard errors."""
    ours, *others = result.outcomes
    fall = relative_fall(ours.held_out)
    losses: dict[str, list[str]] = {}
    for other in others:
        verdict = "faster" if relative_fall(other.held_out) < fall else "no faster"
        losses.setdefault(verdict, []).append(f"{other.policy}'s ({relative_fall(other.held_out):.2f})")
    shares: dict[str, list[str]] = {}
    for whom, solved in [("before", result.solved_before), *((f"with {o.policy}", o.solved) for o in others)]:
        gap, error = difference(ours.solved, solved)
        verdict = "neither clearly more nor fewer" if abs(gap) <= 2 * error else "more" if gap > 0 else "fewer"
        shares.setdefault(verdict, []).append(f"{whom} ({100 * gap:+.0f} ± {100 * error:.0f} points)")
    return (
        f"On held-out problems the loss of {ours.policy}'s selection fell by ln(before / after) = {fall:.2f}, "
        f"{_compare(losses)}; of {len(ours.solved)} new problems the student that was trained on it solves "
        f"{_compare(shares)}."
    )


def _compare(verdicts: Mapping[str, Sequence[str]]) -> str:
    """Each verdict with those that it holds against."""
    return ", ".join(f"{verdict} than {' and than '.join(whom)}" for verdict, whom in verdicts.items())


def _arrow(losses: tuple[float, float]) -> str:
    return f"{losses[0]:.3f} -> {losses[1]:.3f}"


def _with_error(measured: tuple[float, float]) -> str:
    return f"{measured[0]:.0%} ± {100 * measured[1]:.0f}"
