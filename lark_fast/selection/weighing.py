"""Scores in, the weight of every trajectory out: a policy sees each problem once, many problems at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.kernels.chi2 import chi2_divergence, effective_sample_size
from lark_fast.selection.policies import (
    RANDOM,
    TEACHER_RANK,
    Bools,
    Floats,
    Policy,
    PolicyOptions,
    find_policy,
    random_draws,
)
from lark_fast.selection.scored_rows import ScoredRows

if TYPE_CHECKING:
    from lark_fast.selection.constrained import ConstrainedWeights
    from lark_fast.selection.constraints import Constraints


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """What a policy decided; means are over the problems that have a row.

    Attributes:
        rows: ``[C]`` those that become training rows, in order.
        weight: ``[C]``.
        empty_problems: those that have no row.
        whole_problems: how many have no more candidates than the budget, so that all of theirs are kept.
        mean_chi2_divergence: from the uniform prior over the candidates that have a g_hat.
    """

    rows: NDArray[np.int64]
    weight: Floats
    empty_problems: NDArray[np.int64]
    whole_problems: int
    mean_effective_sample_size: float
    mean_chi2_divergence: float


def needed_columns(policy: str) -> tuple[str, ...]:
    """The columns of the scores that ``weigh`` reads: g_hat, and what the policy looks at."""
    names = ("g_hat", *find_policy(policy).columns)
    return tuple(dict.fromkeys(name for name in names if name not in (RANDOM, TEACHER_RANK, "n_tokens")))


def weigh(
    rows: ScoredRows,
    policy: str,
    options: PolicyOptions,
    *,
    seed: int = 0,
    teacher_order: Sequence[str] = (),
) -> Weighed:
    """Weights of all trajectories. Those without a g_hat get none, whatever the policy.

    Args:
        rows: with the ``needed_columns``; g_hat is NaN for what must not be chosen.
        policy: see ``find_policy``.
        options: what the policy is told.
        seed: of random draws.
        teacher_order: the teachers that the policy "teacher" prefers, best first; others come after them, alike.

    Raises:
        UserError: a number is infinite or missing, or no trajectory has a g_hat; with ties="reference", a problem has
            none.
    """
    found = find_policy(policy)
    columns = _columns(rows, found, options, seed, teacher_order)
    weight, chosen = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    whole = 0
    for block in rows.padded_blocks():
        present = (block >= 0) & ~np.isnan(columns["g_hat"][block])
        some = present.any(axis=1)
        block, present = block[some], present[some]
        padded = {name: np.where(present, column[block], np.nan) for name, column in columns.items()}
        q, taken = found.weigh(padded, options)
        weight[block[present]], chosen[block[present]] = q[present], taken[present]
        if options.tau is None:
            few = present.sum(axis=1) <= options.size
            alike = np.where(present, q, np.inf).min(axis=1) >= q.max(axis=1) * (1 - 1e-12)
            whole += int((few & alike & (taken == present).all(axis=1)).sum())
    _refuse_empty(rows, columns["g_hat"], options)
    return sum_up(rows, ~np.isnan(columns["g_hat"]), weight, chosen, whole_problems=whole)


def constrained(
    rows: ScoredRows,
    constraints: "Constraints",
    groups: Mapping[str, tuple[NDArray[np.int32], list[str]]],
    *,
    budget: int | None,
    tau: float | None,
) -> tuple[Weighed, "ConstrainedWeights"]:
    """Weights under constraints that tie problems together, and how these bind.

    Raises:
        UserError: a g_hat is infinite, none is there, or the constraints cannot all hold.
    """
    from lark_fast.selection.constrained import constrained_weights
    from lark_fast.selection.program import Candidates

    energies = rows.numbers["g_hat"]
    usable = ~np.isnan(energies)
    _refuse_not_finite(rows, "g_hat", energies, usable)
    _refuse_empty(rows, energies, PolicyOptions())
    candidates = Candidates(problem=rows.problem, energies=energies, n_tokens=rows.n_tokens, groups=groups)
    solved = constrained_weights(candidates, constraints, budget=budget, tau=tau)
    return sum_up(rows, usable, solved.weight, solved.weight > 0), solved


def sum_up(rows: ScoredRows, usable: Bools, weight: Floats, chosen: Bools, *, whole_problems: int = 0) -> Weighed:
    """Sum up weights.

    Args:
        rows: the R scored trajectories.
        usable: ``[R]`` those that could have been chosen.
        weight: ``[R]``.
        chosen: ``[R]`` those that become training rows.
        whole_problems: see ``Weighed``.
    """
    empty = np.bincount(rows.problem, weights=chosen, minlength=rows.n_problems) == 0
    sizes, divergences = [], []
    for block in rows.padded_blocks():
        block = block[~empty[rows.problem[block[:, 0]]]]
        present = (block >= 0) & usable[block]
        q = np.where(present, weight[block], 0.0)
        q /= q.sum(axis=1, keepdims=True)  # under constraints a problem's weights may sum to less than 1
        sizes.append(effective_sample_size(q))
        divergences.append(chi2_divergence(q, present / np.maximum(present.sum(axis=1, keepdims=True), 1)))
    taken = np.flatnonzero(chosen)
    return Weighed(
        rows=taken,
        weight=weight[taken],
        empty_problems=np.flatnonzero(empty),
        whole_problems=whole_problems,
        mean_effective_sample_size=_mean(sizes),
        mean_chi2_divergence=_mean(divergences),
    )


def _mean(parts: list[Floats]) -> float:
    values = np.concatenate(parts)
    return float(values.mean()) if len(values) else 0.0


def _columns(
    rows: ScoredRows, policy: Policy, options: PolicyOptions, seed: int, teacher_order: Sequence[str]
) -> dict[str, Floats]:
    """What the policy looks at, ``[R]`` each; g_hat is NaN for what cannot be chosen, and there no number matters."""
    g_hat = rows.numbers["g_hat"]
    usable = ~np.isnan(g_hat)
    if options.ties == "reference":
        usable &= g_hat != -np.inf
    columns = {}
    for name in dict.fromkeys(("g_hat", *policy.columns)):
        if name == RANDOM:
            columns[name] = random_draws(rows.keys, seed)
        elif name == TEACHER_RANK:
            _refuse_unknown(rows, teacher_order)
            places = {teacher: place for place, teacher in enumerate(teacher_order)}
            ranks = [places.get(teacher, len(places)) for teacher in rows.teachers]
            columns[name] = np.array(ranks, dtype=np.float64)[rows.teacher]
        elif name == "n_tokens":
            columns[name] = rows.n_tokens.astype(np.float64)
        else:
            columns[name] = rows.numbers[name]
            _refuse_not_finite(rows, name, columns[name], usable)
    columns["g_hat"] = np.where(usable, g_hat, np.nan)
    return columns


def _refuse_unknown(rows: ScoredRows, teachers: Sequence[str]) -> None:
    for teacher in teachers:
        if teacher not in rows.teachers:
            known = ", ".join(map(repr, sorted(rows.teachers)[:10]))
            raise UserError(f"--teacher-order: no trajectory is by {teacher!r}; there are {known}")


def _refuse_not_finite(rows: ScoredRows, name: str, values: Floats, usable: Bools) -> None:
    wrong = np.flatnonzero(usable & ~np.isfinite(values))
    if len(wrong):
        problem, candidate, _ = rows.locate(int(wrong[0]))
        raise UserError(
            f"{rows.directory}: problem {problem!r}, candidate {candidate!r}: {name} is {values[wrong[0]]} "
            f"({len(wrong):,} such candidates); only finite numbers can be selected from"
        )


def _refuse_empty(rows: ScoredRows, g_hat: Floats, options: PolicyOptions) -> None:
    empty = np.bincount(rows.problem, weights=~np.isnan(g_hat), minlength=rows.n_problems) == 0
    if empty.all():
        raise UserError(f"{rows.directory}: no trajectory has a g_hat, so nothing can be selected")
    if empty.any() and options.ties == "reference":
        first = int(np.argmax(empty))
        raise UserError(
            f"{rows.directory}: no candidate of problem {rows.problem_name(first)!r} has a g_hat "
            f"({int(empty.sum()):,} such problems), and there the released code fails; --ties exact leaves such "
            "problems out"
        )
