"""How far approximate scores are from exact ones of the same trajectories, and what that does to a selection."""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lark_fast.kernels.chi2 import chi2_solve
from lark_fast.ranks import rank_correlation, rank_correlations
from lark_fast.scoring.learnability import g_hat

Floats = NDArray[np.float64]


class Scores(NamedTuple):
    """What a selection is made of."""

    nll: ArrayLike  # [N] nats, the mean of each trajectory
    brier: ArrayLike  # [N] the one that rho is made of


@dataclass(frozen=True, slots=True, kw_only=True)
class Closeness:
    """Of two columns; NaN where there is nothing to compare.

    Attributes:
        spearman: rank correlation over all trajectories.
        largest_error, rms_error: of the differences, largest and root mean square, in the column's own units.
        rms: root mean square of the exact column, to read the errors by.
    """

    spearman: float
    largest_error: float
    rms_error: float
    rms: float

    def __str__(self) -> str:
        return (
            f"Spearman {self.spearman:.4f}, off by {self.largest_error:.2g} at most "
            f"(rms {self.rms_error:.2g} of {self.rms:.2g})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Approximate scores beside exact ones; NaN where there is nothing to compare.

    Attributes:
        trajectories: that have a number in both.
        lost: that have one in the exact scores alone.
        problems: with more than ``budget`` candidates, so that there is a choice; of these are the next numbers.
        budget: B.
        same_top: share of them whose B best by g_hat are the same.
        total_variation, largest_total_variation: half the sum of |difference| of a problem's chi2 weights at B, mean
            and largest; 1 where the approximate scores leave nothing to weigh.
        nll, brier, g_hat: the columns.
        g_hat_within: Spearman of g_hat among the candidates of a problem, mean over the problems that have one.
    """

    trajectories: int
    lost: int
    problems: int
    budget: int
    same_top: float
    total_variation: float
    largest_total_variation: float
    nll: Closeness
    brier: Closeness
    g_hat: Closeness
    g_hat_within: float

    def __str__(self) -> str:
        parts = [f"nll: {self.nll}", f"Brier score: {self.brier}", f"g_hat: {self.g_hat}"]
        if not math.isnan(self.g_hat_within):
            parts[-1] += f", Spearman within problems {self.g_hat_within:.4f}"
        if self.problems:
            parts.append(
                f"the same top {self.budget} in {100 * self.same_top:.1f} % of {self.problems:,} problems, weights "
                f"{self.total_variation:.2g} apart in the mean, {self.largest_total_variation:.2g} at most (total "
                "variation)"
            )
        if self.lost:
            parts.append(f"{self.lost:,} trajectories have lost their numbers")
        return "; ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Its fields by name; None where there is no number, which JSON has none for."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def agreement(exact: Scores, approximate: Scores, problem: ArrayLike, budget: int = 3) -> Agreement:
    """Compare scores of the same trajectories.

    Args:
        exact, approximate: ``[N]`` columns, in one order; what is not finite has no number.
        problem: ``[N]`` problem of each trajectory, numbers or strings, in any order.
        budget: how many candidates of a problem shall hold weight, at least 1.

    Raises:
        ValueError: the columns are not of one length; a budget below 1.
    """
    members = np.unique(np.asarray(problem), return_inverse=True)[1]
    order = np.argsort(members, kind="stable")  # a problem's rows one behind another
    ours, theirs = (np.array([scores.nll, scores.brier], np.float64) for scores in (approximate, exact))
    energies, true_energies = (g_hat(*columns, members)[order] for columns in (ours, theirs))
    counts = np.bincount(members)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    apart = _total_variation(true_energies, energies, offsets, budget)
    groups = [slice(*bounds) for bounds in itertools.pairwise(offsets)]
    choices = [place for place, rows in enumerate(groups) if np.isfinite(true_energies[rows]).sum() > budget]
    same = [_best(true_energies[groups[i]], budget) == _best(energies[groups[i]], budget) for i in choices]
    finite = np.isfinite(theirs).all(axis=0)
    both = finite & np.isfinite(ours).all(axis=0)
    usable = np.isfinite(energies) & np.isfinite(true_energies)
    within = rank_correlations(true_energies[usable], energies[usable], members[order][usable])
    return Agreement(
        trajectories=int(both.sum()),
        lost=int((finite & ~both).sum()),
        problems=len(choices),
        budget=budget,
        same_top=_mean(np.array(same, np.float64)),
        total_variation=_mean(apart[choices]),
        largest_total_variation=float(apart[choices].max()) if choices else math.nan,
        nll=_closeness(theirs[0, both], ours[0, both]),
        brier=_closeness(theirs[1, both], ours[1, both]),
        g_hat=_closeness(true_energies[usable], energies[usable]),
        g_hat_within=_mean(within),
    )


def _closeness(exact: Floats, approximate: Floats) -> Closeness:
    if not len(exact):
        return Closeness(spearman=math.nan, largest_error=math.nan, rms_error=math.nan, rms=math.nan)
    apart = np.abs(approximate - exact)
    return Closeness(
        spearman=rank_correlation(exact, approximate),
        largest_error=float(apart.max()),
        rms_error=float(np.sqrt((apart**2).mean())),
        rms=float(np.sqrt((exact**2).mean())),
    )


def _best(energies: Floats, budget: int) -> set[int]:
    """Places of the best; of equal ones the first, so that trajectories with the same tokens tie alike."""
    order = np.argsort(-energies, kind="stable")  # NaN comes last
    return {place for place in order[:budget].tolist() if np.isfinite(energies[place])}


def _total_variation(exact: Floats, approximate: Floats, offsets: NDArray[np.int64], budget: int) -> Floats:
    """``[problems]`` of the chi2 weights."""
    if not len(exact):
        return np.zeros(0)
    ours, theirs = (chi2_solve(values, budget, offsets=offsets).q for values in (approximate, exact))
    # The larger of the two halves: they differ only where one side has no weights.
    gained, gone = (np.add.reduceat(np.maximum(part, 0.0), offsets[:-1]) for part in (ours - theirs, theirs - ours))
    return np.maximum(gained, gone)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
