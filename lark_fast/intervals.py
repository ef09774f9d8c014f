"""How sure a mean over problems is, and the difference of two: by resampling the problems."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE, RESAMPLES = 0.95, 10_000
_EXACT_UP_TO = 14  # differences whose signs are all tried; 2^14 = 16,384


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and where it lies with a confidence of 95 %; NaN without problems."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """A mean difference on the same problems.

    Attributes:
        problems: how many both have.
        p_value: how likely so large a difference is, of either sign, where there is none.
    """

    difference: Interval
    p_value: float
    problems: int


def mean_interval(values: ArrayLike, *, seed: int = 0) -> Interval:
    """The mean over problems and its bootstrap interval (percentiles; Efron and Tibshirani 1993, chapter 13).

    Where all problems have the same value, 0 or 1, every resample is the same: there the interval is the exact binomial
    one (Clopper and Pearson 1934), so that none of 20 solved is 0 with 0 to 17 %, not 0 for sure.

    Args:
        values: ``[P]``, a number a problem.
        seed: of the resamples.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return Interval(mean=float("nan"), low=float("nan"), high=float("nan"))
    mean = float(values.mean())
    if np.ptp(values) == 0:
        if mean in (0.0, 1.0):
            from scipy.stats import binomtest

            exact = binomtest(round(mean * len(values)), len(values)).proportion_ci(CONFIDENCE, method="exact")
            return Interval(mean=mean, low=float(exact.low), high=float(exact.high))
        return Interval(mean=mean, low=mean, high=mean)
    low, high = np.quantile(_resampled_means(values, seed), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean=mean, low=float(low), high=float(high))


def paired_difference(ours: ArrayLike, theirs: ArrayLike, *, seed: int = 0) -> PairedDifference:
    """The mean of ours - theirs over problems, its bootstrap interval, and a sign-flip test of no difference.

    Under no difference each problem's difference has either sign with the same chance (Fisher 1935). All 2^k patterns
    of the k differences that are not 0 are tried where k <= 14, which for 0/1 values is McNemar's exact test; else
    10,000 at random, counted with the pattern that was seen.

    Args:
        ours: ``[P]``, a number a problem.
        theirs: ``[P]``, of the same problems.
        seed: of resamples and signs.

    Raises:
        ValueError: of two lengths, or empty.
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape or not ours.size:
        raise ValueError(f"needs the same problems, one or more, not {ours.shape} and {theirs.shape}")
    gaps = ours - theirs
    mean = float(gaps.mean())
    low, high = (mean, mean)
    if np.ptp(gaps):
        means = _resampled_means(gaps, seed)
        low, high = map(float, np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    return PairedDifference(
        difference=Interval(mean=mean, low=low, high=high), p_value=_sign_flips(gaps, seed), problems=len(gaps)
    )


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """``[RESAMPLES]`` means of as many values drawn with replacement; a few megabytes at a time."""
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    rows = max(1, 1_000_000 // len(values))
    for start in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - start), len(values))
        means[start : start + size[0]] = values[rng.integers(len(values), size=size)].mean(axis=1)
    return means


def _sign_flips(gaps: NDArray[np.float64], seed: int) -> float:
    """The share of sign patterns whose sum is as far from 0 as the one that was seen."""
    sizes = np.abs(gaps[gaps != 0])
    seen = abs(gaps.sum()) * (1 - 1e-9)  # patterns that are as far but for rounding count
    if not len(sizes):
        return 1.0
    if len(sizes) <= _EXACT_UP_TO:
        patterns = 1 - 2.0 * ((np.arange(1 << len(sizes))[:, None] >> np.arange(len(sizes))) & 1)
        return float((np.abs(patterns @ sizes) >= seen).mean())
    rng = np.random.default_rng(seed)
    as_far, rows = 1, max(1, 1_000_000 // len(sizes))
    for start in range(0, RESAMPLES, rows):
        signs = rng.integers(2, size=(min(rows, RESAMPLES - start), len(sizes)), dtype=np.int8)
        as_far += int((np.abs((1 - 2.0 * signs) @ sizes) >= seen).sum())
    return as_far / (RESAMPLES + 1)
