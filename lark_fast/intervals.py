"""How sure a mean over problems is, and the difference of two: by resampling the problems. And a mean over a few runs.

Problems are the units everywhere: several answers to one problem are not independent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lark_fast.errors import UserError

CONFIDENCE, RESAMPLES = 0.95, 10_000
_CLUSTERED_RESAMPLES = 2_000  # of a statistic that is computed anew for each
_BATCH_NUMBERS = 1 << 21  # that are held at a time
_ROUNDING = 1e-12  # of differences of numbers of that size


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean, or another statistic, and where it lies with a confidence of 95 %; NaN where nobody can say."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on that side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


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


def in_percent(mean: float, low: float, high: float) -> str:
    """A share with its interval as people read it: "12.0 (4.0 to 22.0)"."""
    return f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def told(interval: Interval, digits: int = 2) -> str:
    """ "0.45 (0.31 to 0.58)"; without bounds where there are none."""
    if math.isnan(interval.mean):
        return "unknown"
    if math.isnan(interval.low):
        return f"{interval.mean:.{digits}f}"
    return f"{interval.mean:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def refuse_without_scipy(what: str) -> None:
    """Before work for hours whose measures nobody could take.

    Raises:
        UserError: scipy is not installed.
    """
    if find_spec("scipy") is None:
        raise UserError(f"{what} needs scipy: pip install 'lark-fast[evidence]'")


def t_interval(values: ArrayLike, *, confidence: float = CONFIDENCE) -> Interval:
    """The mean of a few independent runs and its interval by Student's t; NaN bounds for a single one.

    Args:
        values: ``[S]``, finite.
        confidence: above 0, below 1.
    """
    found = _checked(values, None)
    mean = float(found.mean())
    if len(found) < 2:
        return Interval(mean=mean, low=math.nan, high=math.nan)
    from scipy.stats import t

    half = float(t.ppf((1 + confidence) / 2, len(found) - 1)) * float(found.std(ddof=1)) / len(found) ** 0.5
    return Interval(mean=mean, low=mean - half, high=mean + half)


def paired_intervals(values: ArrayLike, baseline: int, *, confidence: float = CONFIDENCE) -> list[Interval]:
    """How far the means of several treatments are from that of one of them, where all were tried with the same seeds.

    A two-way layout: value = treatment + seed + chance, chance of one size everywhere. Its size is estimated from all
    (P - 1)(S - 1) residuals together, which a few seeds of two treatments alone could not do.

    Args:
        values: ``[P, S]``, finite; P treatments with S seeds.
        baseline: the row that the others are compared with.
        confidence: above 0, below 1.

    Returns:
        P of them, the baseline's 0 to 0; NaN bounds for a single seed.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 2 or not found.size or not np.isfinite(found).all():
        raise ValueError(f"finite values [P, S] are needed, not {found.shape}")
    gaps = found.mean(axis=1) - found[baseline].mean()
    freedom = (found.shape[0] - 1) * (found.shape[1] - 1)
    if freedom < 1:
        half = math.nan
    else:
        from scipy.stats import t

        rest = found - found.mean(axis=1, keepdims=True) - found.mean(axis=0) + found.mean()
        error = math.sqrt(2 * (rest**2).sum() / freedom / found.shape[1])
        half = float(t.ppf((1 + confidence) / 2, freedom)) * error
    return [
        Interval(mean=float(gap), low=float(gap) - half, high=float(gap) + half)
        if row != baseline
        else Interval(mean=0.0, low=0.0, high=0.0)
        for row, gap in enumerate(gaps)
    ]


def slope_interval(x: ArrayLike, values: ArrayLike, *, confidence: float = CONFIDENCE) -> Interval:
    """The slope of values over x by least squares, one slope for all seeds and an offset of its own for each.

    Args:
        x: ``[P]``, not all the same.
        values: ``[P, S]``, finite.
        confidence: above 0, below 1.
    """
    found = np.asarray(values, dtype=np.float64)
    centred = np.asarray(x, dtype=np.float64) - np.mean(x)
    gaps = found - found.mean(axis=0)
    weight = float(centred @ centred) * found.shape[1]
    slope = float((centred @ gaps).sum()) / weight
    freedom = (found.shape[0] - 1) * found.shape[1] - 1
    if freedom < 1:
        return Interval(mean=slope, low=math.nan, high=math.nan)
    from scipy.stats import t

    rest = gaps - slope * centred[:, None]
    half = float(t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(float((rest**2).sum()) / freedom / weight)
    return Interval(mean=slope, low=slope - half, high=slope + half)


def joint_interval(*intervals: Interval) -> Interval:
    """Of one figure with several independent sources of chance, an interval for each: had all of them been otherwise.

    Half widths add as their squares. For normal errors that is exact; with Student's t in one of them, a little wide.
    Asking that each interval by itself excludes 0 would not do: of two sources alike, 17 % of figures that are 0 would
    seem to differ at 95 %.

    Args:
        intervals: of the same mean.
    """
    mean = intervals[0].mean
    low, high = (math.sqrt(sum((getattr(one, side) - one.mean) ** 2 for one in intervals)) for side in ("low", "high"))
    return Interval(mean=mean, low=mean - low, high=mean + high)


def clustered_interval(
    statistic: Callable[..., float],
    groups: ArrayLike,
    *columns: ArrayLike,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """A statistic of rows that come in groups, and its interval, had other groups been drawn: a percentile bootstrap.

    Args:
        statistic: of the columns, in any number of rows.
        groups: ``[R]`` each row's, numbers or strings; whole groups are drawn.
        columns: ``[R]`` each.
        confidence: above 0, below 1.
        seed: of the draws.

    Returns:
        NaN bounds for a single group, or where more than half of the draws have no value.
    """
    found = [np.asarray(column) for column in columns]
    members = np.unique(np.asarray(groups), return_inverse=True)[1]
    order, sizes = np.argsort(members, kind="stable"), np.bincount(members)
    rows = np.split(order, np.cumsum(sizes)[:-1])
    value = float(statistic(*found))
    if len(rows) < 2:
        return Interval(mean=value, low=math.nan, high=math.nan)
    draws = np.random.default_rng(seed).integers(len(rows), size=(_CLUSTERED_RESAMPLES, len(rows)))
    values = np.empty(len(draws))
    for number, draw in enumerate(draws):
        chosen = np.concatenate([rows[group] for group in draw])
        values[number] = statistic(*(column[chosen] for column in found))
    if np.isfinite(values).mean() < 0.5:
        return Interval(mean=value, low=math.nan, high=math.nan)
    low, high = np.quantile(values[np.isfinite(values)], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=value, low=float(low), high=float(high))


def mean_interval(values: ArrayLike, *, seed: int = 0, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Interval:
    """The mean of one value a problem, and its BCa bootstrap interval (Efron 1987) over problems.

    BCa and not plain percentiles, for it follows the skew of shares near 0 and 1: of simulated benchmarks of 30
    problems, five answers each and 3 % right, a percentile interval of 95 % holds the truth in 87 %, BCa in 98 %.

    Where all P values are the same, resampling says that nothing is uncertain. There the interval is exact: with
    a = 1 - CONFIDENCE, a share of other values above 1 - (a/2)^(1/P) would have shown itself at least once with a
    probability above 1 - a/2, and what it holds lies within ``bounds``. For zeros and ones that is the exact binomial
    interval (Clopper and Pearson 1934); 0 of 50 right gives [0, 0.071]. One problem alone is such a case.

    Args:
        values: ``[P]``, finite.
        seed: of the resamples.
        bounds: what a value can be at the least and at the most; None: anything, and then equal values have no
            interval (NaN).

    Raises:
        ValueError: no values, or values that are not finite or not within the bounds.
    """
    found = _checked(values, bounds)
    mean = float(found.mean())
    if np.ptp(found) <= _ROUNDING * np.abs(found).max():
        low, high = _of_equal_values(float(found[0]), len(found), bounds)
        return Interval(mean=mean, low=low, high=high)
    from scipy.stats import bootstrap

    scale = np.abs(found).max()
    interval = bootstrap(
        (found / scale,),
        _tied_mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=_batch(found),
        method="BCa",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean=mean, low=float(interval.low * scale), high=float(interval.high * scale))


def paired_difference(
    ours: ArrayLike,
    theirs: ArrayLike,
    *,
    seed: int = 0,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> PairedDifference:
    """How far two runs' means over the same problems are apart: ``mean_interval`` of ours - theirs, and a test.

    The test flips signs of the differences (a paired permutation test): were both runs alike, ours - theirs would be
    as likely as theirs - ours at every problem. Problems without a difference have no say. Differences all of one
    size, as of zeros and ones, are flips of a coin, counted exactly (McNemar's exact test). Of others, all flips are
    counted where there are no more than RESAMPLES of them; else as many are drawn, and p = 2 min(b + 1) /
    (RESAMPLES + 1) with b draws at least as far out on a side, which is never 0. When the runs change places, the
    p-value stays and the interval changes its sign.

    Args:
        ours: ``[P]``, one value a problem.
        theirs: ``[P]``, of the same problems in the same order.
        seed: of the resamples and of the signs.
        bounds: of the values; see ``mean_interval``.

    Raises:
        ValueError: see ``mean_interval``; or the runs differ in length.
    """
    a, b = _checked(ours, bounds), _checked(theirs, bounds)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values are to be paired with {len(b)}")
    differences = a - b
    width = None if bounds is None else bounds[1] - bounds[0]
    return PairedDifference(
        difference=mean_interval(differences, seed=seed, bounds=None if width is None else (-width, width)),
        p_value=_sign_flips(differences, seed),
        problems=len(a),
    )


def _sign_flips(differences: NDArray[np.float64], seed: int) -> float:
    """The p-value of a mean of 0."""
    from scipy.stats import binomtest, permutation_test

    sizes = np.abs(differences)
    # What differs by rounding alone does not differ: 0.6 - 0.4 is not 0.8 - 0.6.
    moved = differences[sizes > _ROUNDING * sizes.max()]
    if not len(moved):
        return 1.0
    sizes = np.abs(moved)
    if np.ptp(sizes) <= _ROUNDING * sizes.max():
        return float(binomtest(int((moved > 0).sum()), len(moved)).pvalue)
    test = permutation_test(
        (moved / sizes.max(),),
        _tied_mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=_batch(moved),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def _tied_mean(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    # BCa and the test count ties, which the order of a sum must not break.
    return np.round(values.mean(axis=axis), 12)


def _of_equal_values(value: float, n: int, bounds: tuple[float, float] | None) -> tuple[float, float]:
    if bounds is None:
        return math.nan, math.nan
    same = ((1 - CONFIDENCE) / 2) ** (1 / n)
    low, high = (value * same + bound * (1 - same) for bound in bounds)
    return low, high


def _checked(values: ArrayLike, bounds: tuple[float, float] | None) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"values have the shape {found.shape}; one value a problem, and at least one, is needed")
    if not np.isfinite(found).all():
        raise ValueError(f"value {np.flatnonzero(~np.isfinite(found))[0]} is not finite; leave such problems out")
    if bounds is not None and not (found.min() >= bounds[0] and found.max() <= bounds[1]):
        raise ValueError(f"values lie between {found.min():g} and {found.max():g}, not within {bounds}")
    return found


def _batch(values: NDArray[np.float64]) -> int:
    return max(1, _BATCH_NUMBERS // len(values))
