"""Intervals and tests over problems, against enumeration, scipy, known values and simulated truth."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lark_fast.intervals import (
    Interval,
    clustered_interval,
    joint_interval,
    mean_interval,
    paired_difference,
    paired_intervals,
    slope_interval,
    t_interval,
    told,
)


def enumerated_p_value(differences):
    """Every flip of the signs, one after the other."""
    far = abs(sum(differences))
    flips = list(itertools.product((1, -1), repeat=len(differences)))
    sums = (abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips)
    return sum(total >= far - 1e-9 for total in sums) / len(flips)


def test_the_interval_is_scipys_bca():
    values = np.random.default_rng(3).random(40) ** 3
    expected = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(0))
    found = mean_interval(values)
    assert found.mean == pytest.approx(values.mean(), rel=1e-14)
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=1e-10)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=1e-10)


@pytest.mark.parametrize("answers", [3, 5, 7])
def test_rounding_of_shares_does_not_move_an_interval(answers):
    # Counts have exact ties among their resampled means, which their shares must have too.
    counts = np.random.default_rng(answers).binomial(answers, 0.3, 30)
    whole, shares = mean_interval(counts, bounds=None), mean_interval(counts / answers)
    assert shares.low == pytest.approx(whole.low / answers, abs=1e-9)
    assert shares.high == pytest.approx(whole.high / answers, abs=1e-9)


@pytest.mark.parametrize(("right", "n"), [(0, 50), (50, 50), (0, 1), (1, 1), (0, 1319)])
def test_all_right_or_all_wrong_has_the_exact_binomial_interval(right, n):
    expected = stats.binomtest(right, n).proportion_ci(0.95, "exact")
    found = mean_interval(np.full(n, right / n))
    assert (found.mean, found.low, found.high) == pytest.approx((right / n, expected.low, expected.high), abs=1e-12)


def test_equal_shares_are_not_certain():
    found = mean_interval([0.4] * 10)
    same = 0.025**0.1
    assert (found.low, found.high) == pytest.approx((0.4 * same, 0.4 * same + 1 - same))
    one = mean_interval([0.4])
    assert one.low < 0.02
    assert one.high > 0.98


def test_equal_values_of_any_size_have_no_interval():
    found = mean_interval([7.5, 7.5], bounds=None)
    assert found.mean == 7.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_the_seed_counts():
    values = np.random.default_rng(0).random(25)
    found = mean_interval(values)
    assert found == mean_interval(values)
    assert found != mean_interval(values, seed=1)
    assert found.low < found.mean < found.high


@pytest.mark.parametrize(("rate", "problems"), [(0.03, 30), (0.4, 30), (0.9, 90)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(rate, problems):
    draws, trials = np.random.default_rng(1), 200
    held = 0
    for _ in range(trials):
        # Problems differ in how hard they are, which five answers to each do not make up for.
        values = draws.binomial(5, draws.beta(2 * rate, 2 * (1 - rate), problems)) / 5
        found = mean_interval(values)
        held += found.low <= rate <= found.high
    # Three standard deviations of a share of 0.95 in 200 trials are 0.046.
    assert held / trials >= 0.90


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([], "at least one"),
        ([[0.5]], "shape (1, 1)"),
        ([0.5, math.nan], "value 1 is not finite"),
        ([0.5, 1.5], "between 0.5 and 1.5"),
    ],
    ids=["none", "table", "nan", "out-of-bounds"],
)
def test_values_that_cannot_be_used(values, told):
    with pytest.raises(ValueError, match=told.replace("(", r"\(").replace(")", r"\)")):
        mean_interval(values)
    if np.ndim(values) == 1:
        with pytest.raises(ValueError, match=told):
            paired_difference(values, values)


@pytest.mark.parametrize("seed", range(4))
def test_few_differences_are_enumerated(seed):
    draws = np.random.default_rng(seed)
    ours, theirs = draws.binomial(5, 0.6, 12) / 5, draws.binomial(5, 0.4, 12) / 5
    found = paired_difference(ours, theirs)
    assert found.p_value == pytest.approx(enumerated_p_value(list(ours - theirs)), abs=1e-12)
    assert found.difference.mean == pytest.approx(ours.mean() - theirs.mean())
    assert found.problems == 12


@pytest.mark.parametrize(("won", "lost", "alike"), [(9, 2, 20), (5, 5, 0), (60, 31, 400), (1, 0, 3)])
def test_zeros_and_ones_are_mcnemars_exact_test(won, lost, alike):
    ours = np.array([1] * won + [0] * lost + [1] * alike)
    theirs = np.array([0] * won + [1] * lost + [1] * alike)
    expected = stats.binomtest(won, won + lost).pvalue
    assert paired_difference(ours, theirs).p_value == pytest.approx(expected, rel=1e-12)


def test_known_mcnemar_value():
    # 10 discordant pairs, 9 to 1: 2 * (1 + 10) / 2**10.
    assert paired_difference([1] * 9 + [0], [0] * 9 + [1]).p_value == pytest.approx(22 / 1024)


def test_many_differences_are_drawn():
    draws = np.random.default_rng(0)
    ours, theirs = draws.binomial(5, 0.55, 200) / 5, draws.binomial(5, 0.5, 200) / 5
    found = paired_difference(ours, theirs)
    # Of whole numbers, the sum under all flips is a convolution.
    differences = np.rint(5 * (ours - theirs)).astype(int)
    sums = np.ones(1)
    for size in np.abs(differences[differences != 0]):
        sums = np.convolve(sums, [0.5, *[0] * (2 * size - 1), 0.5])
    far = np.abs(np.arange(len(sums)) - len(sums) // 2) >= abs(differences.sum())
    # A p-value of 10,000 draws has a standard deviation of at most 0.01.
    assert found.p_value == pytest.approx(sums[far].sum(), abs=0.025)
    assert found.difference.low < found.difference.mean < found.difference.high
    far = paired_difference(draws.random(60) * 0.1 + 0.9, draws.random(60) * 0.1)
    assert far.p_value == pytest.approx(2 / 10_001)


def test_rounding_is_no_difference():
    ours = np.array([1.0] * 14 + [0.0] * 12 + [0.6 - 0.4, 0.1 + 0.2])
    theirs = np.array([0.0] * 14 + [1.0] * 12 + [0.8 - 0.6, 0.3])
    assert (ours != theirs).all()
    assert paired_difference(ours, theirs).p_value == pytest.approx(stats.binomtest(14, 26).pvalue, rel=1e-12)


@pytest.mark.parametrize("problems", [10, 120])
def test_runs_that_change_places_change_the_sign_alone(problems):
    draws = np.random.default_rng(problems)
    ours, theirs = draws.binomial(3, 0.7, problems) / 3, draws.binomial(3, 0.5, problems) / 3
    one, other = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert one.p_value == other.p_value
    ours, theirs = one.difference, other.difference
    assert (ours.mean, ours.low, ours.high) == pytest.approx((-theirs.mean, -theirs.high, -theirs.low), abs=1e-9)


def test_runs_alike():
    found = paired_difference([0, 1, 1, 0] * 10, [0, 1, 1, 0] * 10)
    assert (found.difference.mean, found.p_value, found.problems) == (0, 1, 40)
    # Where one in eleven problems differed, one of forty would have shown it in 97.5 %.
    assert (found.difference.low, found.difference.high) == pytest.approx(
        (0.025 ** (1 / 40) - 1, 1 - 0.025 ** (1 / 40))
    )


def test_runs_of_different_length():
    with pytest.raises(ValueError, match="2 values are to be paired with 3"):
        paired_difference([0, 1], [0, 1, 1])


def test_the_mean_of_a_few_runs_is_students():
    values = np.array([2.1, 2.4, 2.0, 2.2])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = t_interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    wider = t_interval(values, confidence=0.99)
    assert wider.low < found.low
    assert math.isnan(t_interval([1.0]).low)


def test_two_treatments_of_paired_intervals_are_the_paired_t_test():
    values = np.random.default_rng(1).normal(size=(2, 5))
    expected = stats.ttest_rel(values[1], values[0]).confidence_interval(0.95)
    base, found = paired_intervals(values, 0)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (base.mean, base.low, base.high, base.sign) == (0, 0, 0, 0)


def test_paired_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(2)
    effects, held = np.array([0.0, 0.3, -0.2, 0.1]), []
    for _ in range(2000):
        values = effects[:, None] + rng.normal(0, 2, 3) + rng.normal(0, 0.1, (4, 3))
        found = paired_intervals(values, 0, confidence=0.9)[1]
        held.append(found.low <= 0.3 <= found.high)
    assert np.mean(held) == pytest.approx(0.9, abs=0.02)


def test_one_seed_gives_no_paired_interval():
    assert all(math.isnan(one.low) for one in paired_intervals([[1.0], [2.0]], 0)[1:])
    with pytest.raises(ValueError, match="finite"):
        paired_intervals([[1.0, math.nan]], 0)


def test_a_slope_of_one_seed_is_linear_regression():
    x, y = np.array([0.1, 0.3, 0.5, 0.7, 0.9]), np.array([1.0, 1.4, 1.1, 1.9, 1.6])
    expected = stats.linregress(x, y)
    found = slope_interval(x, y[:, None])
    assert found.mean == pytest.approx(expected.slope)
    assert found.high - found.mean == pytest.approx(expected.stderr * stats.t.ppf(0.975, 3))
    # Seeds that differ by an offset say the same, more surely.
    more = slope_interval(x, y[:, None] + np.array([0.0, 5.0, -3.0]))
    assert more.mean == pytest.approx(found.mean)
    assert more.high - more.low < found.high - found.low


def test_groups_are_drawn_whole():
    rng = np.random.default_rng(4)
    offsets = rng.normal(0, 1, 40)
    groups = np.repeat(np.arange(40), 10)
    values = offsets[groups] + rng.normal(0, 0.01, 400)
    found = clustered_interval(lambda column: float(column.mean()), groups, values)
    error = offsets.std(ddof=1) / 40**0.5
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert found.mean == pytest.approx(values.mean())
    # Ten rows a group are not ten times as much to go by.
    alone = clustered_interval(lambda column: float(column.mean()), np.arange(400), values)
    assert alone.high - alone.low < 0.5 * (found.high - found.low)


def test_groups_without_a_value():
    assert math.isnan(clustered_interval(lambda column: float(column.mean()), ["a", "a"], [1.0, 2.0]).low)
    nothing = clustered_interval(lambda column: math.nan, ["a", "b"], [1.0, 2.0])
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.low)


def test_an_interval_as_people_read_it():
    assert told(Interval(mean=0.451, low=0.3, high=0.6)) == "0.45 (0.30 to 0.60)"
    assert told(Interval(mean=0.451, low=math.nan, high=math.nan), 1) == "0.5"
    assert told(Interval(mean=math.nan, low=math.nan, high=math.nan)) == "unknown"


def test_two_sources_of_chance_together():
    rng = np.random.default_rng(5)
    wrong = alone = 0
    for _ in range(2000):
        value = rng.normal(0, 1) + rng.normal(0, 1)
        one = Interval(mean=value, low=value - 1.96, high=value + 1.96)
        wrong += joint_interval(one, one).sign != 0
        alone += one.sign != 0
    assert wrong / 2000 == pytest.approx(0.05, abs=0.015)
    assert alone / 2000 > 0.15  # what it would be if each interval had to exclude 0
    nobody = joint_interval(one, Interval(mean=value, low=math.nan, high=math.nan))
    assert math.isnan(nobody.low)
    assert nobody.sign == 0
