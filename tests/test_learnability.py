"""rho and g_hat: the formula, its edge cases, and what it means."""

import numpy as np
import pytest

from lark_fast.scoring.learnability import g_hat, rho


def test_by_hand():
    # Two candidates, S = 3, sum rho nll = 0.5 + 0.8 = 1.3.
    got = g_hat([1.0, 2.0], [0.5, 0.8], ["p", "p"])
    mean = 1.3 / 3
    np.testing.assert_allclose(got, [1 / 3 * (2 * 0.5 - mean), 2 / 3 * (2 * 0.4 - mean)], rtol=1e-15)


def test_is_the_derivative_of_the_relative_decay_rate():
    """g_hat_k = dR/dq_k at uniform q for R(q) = sum q^2 brier / sum q nll: central differences."""
    rng = np.random.default_rng(0)
    nll, brier = rng.uniform(0.1, 2, 7), rng.uniform(0.05, 1, 7)

    def rate(q):
        return (q**2 * brier).sum() / (q * nll).sum()

    q, step = np.full(7, 1 / 7), 1e-6
    slopes = [(rate(q + step * unit) - rate(q - step * unit)) / (2 * step) for unit in np.eye(7)]
    np.testing.assert_allclose(g_hat(nll, brier, [0] * 7), slopes, rtol=1e-7)


def test_problems_do_not_mix_and_order_does_not_matter():
    rng = np.random.default_rng(1)
    nll, brier, problem = rng.uniform(0.1, 2, 60), rng.uniform(0, 1, 60), rng.integers(0, 9, 60)
    together = g_hat(nll, brier, problem)
    for p in range(9):
        own = problem == p
        np.testing.assert_allclose(together[own], g_hat(nll[own], brier[own], problem[own]), rtol=1e-14)
    shuffle = rng.permutation(60)
    np.testing.assert_allclose(g_hat(nll[shuffle], brier[shuffle], problem[shuffle]), together[shuffle], rtol=1e-14)


def test_nothing_to_learn():
    assert np.isnan(g_hat([0.0, 0.0], [0.0, 0.0], [1, 1])).all()
    assert rho(0.0, 0.3) == 0.0
    assert rho(1e-31, 0.3) == 0.0
    # One candidate that is known by heart beside one that is not: only S must be above 1e-30.
    assert np.isfinite(g_hat([0.0, 1.0], [0.0, 0.5], [1, 1])).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_candidate_does_not_spread(broken):
    got = g_hat([1.0, broken, 2.0], [0.5, 0.1, 0.8], [0, 0, 0])
    assert np.isnan(got[1])
    np.testing.assert_array_equal(got[[0, 2]], g_hat([1.0, 2.0], [0.5, 0.8], [0, 0]))


def test_empty_and_wrong_shapes():
    assert g_hat([], [], []).shape == (0,)
    with pytest.raises(ValueError, match=r"\[N\]"):
        g_hat([1.0, 2.0], [0.5], [0, 0])
