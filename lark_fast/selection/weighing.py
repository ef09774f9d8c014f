"""Scores in, the weight of every trajectory out: a policy sees each problem once, many problems at a time."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.kernels.chi2 import chi2_divergence, effective_sample_size
from lark_fast.selection.policies import POLICIES, Bools, Floats, PolicyOptions, random_draws
from lark_fast.selection.scored_rows import ScoredRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """What a policy decided; means are over the problems that have a row."""

    weight: Floats  # [R]
    chosen: Bools  # [R] becomes a training row
    empty_problems: NDArray[np.int64]  # those in which no candidate has a g_hat
    whole_problems: int  # those with no more candidates than the budget, which are all kept
    mean_effective_sample_size: float
    mean_chi2_divergence: float  # from the uniform prior over the candidates that have a g_hat


def needed_columns(policy: str) -> tuple[str, ...]:
    """The columns of numbers that ``weigh`` reads: g_hat, and what the policy looks at."""
    return tuple(dict.fromkeys(name for name in ("g_hat", POLICIES[policy].column) if name is not None))


def weigh(rows: ScoredRows, policy: str, options: PolicyOptions, seed: int) -> Weighed:
    """Weights of all trajectories. Those without a g_hat get none, whatever the policy.

    Raises:
        UserError: a number is infinite, or no trajectory has a g_hat; with ties="reference", a problem has none.
    """
    values = _values(rows, policy, options, seed)
    usable = ~np.isnan(values)
    weight, chosen = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    empty, sizes, divergences, whole = [], [], [], 0
    for block in rows.padded_blocks():
        present = (block >= 0) & usable[block]
        has_any = present.any(axis=1)
        empty.append(rows.problem[block[~has_any, 0]])
        block, present = block[has_any], present[has_any]
        whole += 0 if options.tau is not None else int((present.sum(axis=1) <= options.size).sum())
        q, taken = POLICIES[policy].weigh(np.where(present, values[block], np.nan), options)
        weight[block[present]], chosen[block[present]] = q[present], taken[present]
        sizes.append(effective_sample_size(q))
        divergences.append(chi2_divergence(q, present / present.sum(axis=1, keepdims=True)))
    empty_problems = np.sort(np.concatenate(empty))
    _refuse_empty(rows, empty_problems, options)
    return Weighed(
        weight=weight,
        chosen=chosen,
        empty_problems=empty_problems,
        whole_problems=whole,
        mean_effective_sample_size=float(np.concatenate(sizes).mean()),
        mean_chi2_divergence=float(np.concatenate(divergences).mean()),
    )


def _values(rows: ScoredRows, policy: str, options: PolicyOptions, seed: int) -> Floats:
    """What the policy looks at, ``[R]``, NaN where there is no g_hat."""
    g_hat, column = rows.numbers["g_hat"], POLICIES[policy].column
    values = random_draws(rows.keys, seed) if column is None else rows.numbers[column]
    usable = ~np.isnan(g_hat)
    if options.ties == "reference":
        usable &= g_hat != -np.inf
    wrong = np.flatnonzero(usable & ~(np.isfinite(g_hat) & np.isfinite(values)))
    if len(wrong):
        problem, candidate, _ = rows.locate(int(wrong[0]))
        name = column if column is not None and np.isfinite(g_hat[wrong[0]]) else "g_hat"
        raise UserError(
            f"{rows.directory}: problem {problem!r}, candidate {candidate!r}: {name} is {rows.numbers[name][wrong[0]]} "
            f"({len(wrong):,} such candidates); only finite numbers can be selected from"
        )
    return np.where(usable, values, np.nan)


def _refuse_empty(rows: ScoredRows, empty_problems: NDArray[np.int64], options: PolicyOptions) -> None:
    if len(empty_problems) == rows.n_problems:
        raise UserError(f"{rows.directory}: no trajectory has a g_hat, so nothing can be selected")
    if len(empty_problems) and options.ties == "reference":
        name = rows.problem_name(int(empty_problems[0]))
        raise UserError(
            f"{rows.directory}: no candidate of problem {name!r} has a g_hat ({len(empty_problems):,} such problems), "
            "and there the released code fails; --ties exact leaves such problems out"
        )
