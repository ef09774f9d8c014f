"""The selection weights against a convex solver, the released code's rule, and their own invariances."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lark_fast.kernels.chi2 import chi2_divergence, chi2_weights, effective_sample_size

NAN, INF = math.nan, math.inf


def critical_tau(e, p, m):
    """T_m by its definition: the largest tau whose solution holds only the top m."""
    order = np.argsort(-e, kind="stable")
    return sum(p[k] * (e[k] - e[order[m]]) for k in order[:m])


def solve_with_cvxpy(e, p, tau):
    cp = pytest.importorskip("cvxpy")
    y = cp.Variable(len(e))
    root = np.sqrt(p)
    target = root * (1 + (e - p @ e) / tau)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(y - target)), [root @ y == 1, y >= 0])
    with warnings.catch_warnings():
        # At tau = T_m exactly one bound is active with multiplier 0; there OSQP may stall at 1e-9, and says so.
        warnings.filterwarnings("ignore", "Solution may be inaccurate")
        problem.solve(solver=cp.OSQP, eps_abs=1e-10, eps_rel=1e-10, max_iter=20_000, polishing=True)
    return root * y.value


def kkt_residual(q, e, p, tau):
    """Largest violation of the optimality conditions, in units of max(tau, spread)."""
    slope = e - tau * (q / p - 1)
    multiplier = slope[q > 0].max()
    violations = [abs(q.sum() - 1), -min(q.min(), 0.0)]
    scale = max(tau, np.ptp(e))
    violations.append(np.abs(slope[q > 0] - multiplier).max() / scale)
    violations.append(max((slope - multiplier).max(), 0.0) / scale)
    return max(violations)


def released_rule(energies, budget):
    """The published selection rule, stated candidate by candidate: uniform prior, absolute thresholds."""
    usable = [(-value, k) for k, value in enumerate(energies) if value == value and value != -INF]
    if not usable:
        return [1 / len(energies) for _ in energies]
    usable.sort()
    chosen, rest = usable[:budget], usable[budget:]
    cut = -rest[0][0] if rest else -chosen[-1][0] - 1e-8
    mean = 0.0
    for negative, _ in chosen:
        mean += -negative
    margin = mean / len(chosen) - cut
    answer = [0.0 for _ in energies]
    for negative, k in chosen:
        answer[k] = 1 / len(chosen) if margin <= 1e-12 else (-negative - cut) / (margin * len(chosen))
    return answer


def random_problem(seed):
    """Random, tied, offset and badly scaled energies with smooth and spiky priors; what a solver may stumble over."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 34))
    e = rng.normal(size=k)
    if seed % 4 == 1:
        e = np.round(e)  # many exact ties
    if seed % 4 == 2:
        e = 0.02 * e + 7.0  # the size and offset of real g_hat values
    if seed % 4 == 3:
        e = np.sort(e**3)  # one candidate far ahead
    p = rng.dirichlet(np.full(k, 0.7 if seed % 2 else 20.0)) + 1e-3
    return rng, e, p / p.sum()


@pytest.mark.parametrize("seed", range(8))  # each kind twice; thousands: test_chi2_solver.py
def test_tau_form_solves_the_convex_program(seed):
    rng, e, p = random_problem(seed)
    tau = float(np.ptp(e) + 0.1) * 10 ** rng.uniform(-2, 2)
    for prior in (None, p):
        p_used = np.full(len(e), 1 / len(e)) if prior is None else prior
        q = chi2_weights(e, tau=tau, prior=prior)
        assert kkt_residual(q, e, p_used, tau) < 1e-12
        np.testing.assert_allclose(q, solve_with_cvxpy(e, p_used, tau), atol=1e-8)


@pytest.mark.parametrize("seed", range(8))  # each kind twice; thousands: test_chi2_solver.py
def test_budget_form_is_the_convex_program_at_its_critical_tau(seed):
    rng, e, p = random_problem(seed)
    budget = int(rng.integers(1, len(e)))
    for prior in (None, p):
        p_used = np.full(len(e), 1 / len(e)) if prior is None else prior
        tau = critical_tau(e, p_used, budget)
        q = chi2_weights(e, budget, prior=prior)
        if tau == 0:  # all of the top tie: the limit tau -> 0 shares by prior among the maximisers
            best = p_used * (e == e.max())
            np.testing.assert_allclose(q, best / best.sum(), rtol=1e-12)
            continue
        assert kkt_residual(q, e, p_used, tau) < 1e-10
        np.testing.assert_allclose(q, solve_with_cvxpy(e, p_used, tau), atol=1e-8)
        np.testing.assert_allclose(q, chi2_weights(e, tau=tau, prior=prior), atol=1e-12)


def test_tau_exactly_at_and_around_a_critical_value_changes_the_support():
    e = np.array([5.0, 3.0, 2.0, 0.0])  # T_1 = 1/2, T_2 = 1, T_3 = 5/2 with p = 1/4: all exact in binary
    for m, critical in ((1, 0.5), (2, 1.0), (3, 2.5)):
        assert critical == critical_tau(e, np.full(4, 0.25), m)
        assert np.count_nonzero(chi2_weights(e, tau=critical)) == m
        assert np.count_nonzero(chi2_weights(e, tau=np.nextafter(critical, INF))) == m + 1


def test_tau_form_keeps_its_digits_when_the_best_candidate_has_a_tiny_prior():
    # sum p e over the support minus P nu would cancel here: the best two lie 1e6 above the rest in units of tau.
    p = np.array([1e-12, 0.5, 0.5 - 1e-12])
    q = chi2_weights([0.0, -1e6, -2e6], prior=p, tau=1e-5)
    above_nu = (1e-5 - 1e-12 * 1e6) / (0.5 + 1e-12)
    expected = p * np.array([1e6 + above_nu, above_nu, 0.0])
    np.testing.assert_allclose(q, expected / 1e-5, rtol=1e-12)


def test_very_large_and_very_small_tau_reach_their_limits():
    e, p = np.array([1.0, 3.0, 3.0, 2.0]), np.array([0.1, 0.2, 0.3, 0.4])
    for scale in (1.0, 1e-300, 1e300):
        np.testing.assert_allclose(chi2_weights(e * scale, prior=p, tau=1.7e308), p, atol=1e-7)
        np.testing.assert_allclose(chi2_weights(e * scale, prior=p, tau=5e-324), [0, 0.4, 0.6, 0], atol=1e-15)


@pytest.mark.parametrize("valid", [1, 2, 3])
def test_no_more_candidates_than_the_budget(valid):
    e = np.array([0.5, -1.0, 2.0])[:valid]
    np.testing.assert_allclose(chi2_weights(e, 3), np.full(valid, 1 / valid), rtol=1e-15)
    prior = np.array([1.0, 2.0, 5.0])[:valid]
    np.testing.assert_allclose(chi2_weights(e, 3, prior=prior), prior / prior.sum(), rtol=1e-15)
    reference = chi2_weights(e, 3, ties="reference")
    np.testing.assert_allclose(reference, released_rule(list(e), 3), atol=1e-12)
    if valid > 1:
        assert 0 < reference[1] < 1e-7


def test_top_of_the_budget_ties_with_the_next():
    e = [1.0, 4.0, 4.0, 4.0, 0.0, 4.0]
    np.testing.assert_allclose(chi2_weights(e, 2), [0, 0.25, 0.25, 0.25, 0, 0.25], rtol=1e-15)
    prior = [1, 1, 2, 3, 9, 4]
    np.testing.assert_allclose(chi2_weights(e, 2, prior=prior), [0, 0.1, 0.2, 0.3, 0, 0.4], rtol=1e-15)
    np.testing.assert_array_equal(chi2_weights(e, 2, ties="reference"), [0, 0.5, 0.5, 0, 0, 0])
    np.testing.assert_allclose(chi2_weights([2.0] * 5, 3), [0.2] * 5, rtol=1e-15)


@pytest.mark.parametrize("ties", ["exact", "reference"])
def test_boundary_ties_hold_no_weight(ties):
    np.testing.assert_allclose(chi2_weights([3.0, 1.0, 2.0, 1.0], 3, ties=ties), [2 / 3, 0, 1 / 3, 0], rtol=1e-15)


@pytest.mark.parametrize("spread", [1e-12, 1.0, 1e12])
def test_ties_are_relative_to_the_spread_and_nothing_else_is(spread):
    nearly, clearly = spread * 5e-10, spread * 2e-9
    tied = chi2_weights([spread, nearly, 0.0, 0.0], 2)
    assert tied[1] == 0
    assert chi2_weights([spread, clearly, 0.0, 0.0], 2)[1] > 0
    np.testing.assert_allclose(chi2_weights([spread, spread - nearly, spread, 0.0], 2), [1 / 3, 1 / 3, 1 / 3, 0])
    apart = chi2_weights([spread, spread - clearly, spread - 2 * clearly, 0.0], 2)
    np.testing.assert_allclose(apart, [2 / 3, 1 / 3, 0, 0], rtol=1e-6)


def test_spread_is_that_of_the_valid_candidates():
    # With the far-off fourth one the first three tie; a prior of 0 takes it out, and they no longer do.
    e = [2e-10, 1e-10, 0.0, -1.0]
    np.testing.assert_allclose(chi2_weights(e, 2), [1 / 3, 1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(chi2_weights(e, 2, prior=[1, 1, 1, 0]), [2 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(chi2_weights([*e[:3], NAN], 2), [2 / 3, 1 / 3, 0, 0])


def test_nan_is_dropped():
    e = np.array([3.0, NAN, 2.0, 1.0, NAN])
    for kwargs in ({"budget": 2}, {"budget": 4}, {"tau": 0.7}, {"budget": 2, "prior": [1, 7, 2, 3, NAN]}):
        q = chi2_weights(e, **kwargs)
        assert np.all(q[[1, 4]] == 0)
        if "prior" in kwargs:
            kwargs = kwargs | {"prior": [1, 2, 3]}
        np.testing.assert_allclose(q[[0, 2, 3]], chi2_weights(e[[0, 2, 3]], **kwargs), rtol=1e-15)


def test_all_nan():
    for kwargs in ({}, {"tau": 1.0}, {"prior": [0, 0, NAN]}, {"tau": 1.0, "prior": [1, 1, 1]}):
        np.testing.assert_array_equal(chi2_weights([NAN] * 3, **kwargs), [0, 0, 0])
    np.testing.assert_array_equal(chi2_weights([NAN] * 3, ties="reference"), [1 / 3] * 3)


@pytest.mark.parametrize("value", [INF, -INF])
def test_infinite_energies(value):
    with pytest.raises(ValueError, match=r"candidate 1 is -?inf"):
        chi2_weights([0.0, value, 1.0])
    with pytest.raises(ValueError, match=r"problem \(row\) 1, candidate \(column\) 2 is -?inf"):
        chi2_weights([[0.0, 1.0, 2.0], [1.0, 2.0, value]], tau=1.0)
    weights = chi2_weights([0.0, value, 1.0, 0.5], 2, ties="reference")
    if value > 0:
        np.testing.assert_array_equal(weights, [0, NAN, 0, 0])
    else:
        np.testing.assert_array_equal(weights, chi2_weights([0.0, NAN, 1.0, 0.5], 2, ties="reference"))


# Zeros bring exact ties, 1e-9 and 1e-13 the absolute thresholds, 1e300 overflow in the sum, inf and NaN their own rows.
REFERENCE_VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0 + 1e-9, 1.0 + 3e-13, 1e300, -1e300, 1.7e308, NAN, INF, -INF]),
    st.floats(-10, 10),
    st.floats(-1e-11, 1e-11),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(REFERENCE_VALUES, min_size=1, max_size=12), st.integers(1, 13))
@example([1.0, 1.0 + 3e-13, 1.0 + 2e-13, 1.0], 2)
@example([INF, INF, INF, 1.0], 2)
def test_reference_ties_follow_the_released_rule(energies, budget):
    np.testing.assert_allclose(
        chi2_weights(energies, budget, ties="reference"), released_rule(energies, budget), rtol=1e-12, atol=1e-12
    )


def test_reference_ties_on_real_sizes_with_an_offset():
    # At e near 7 with differences of 1e-9 the order of the additions already decides digits that 1e-12 can see.
    rng = np.random.default_rng(3)
    e = 7.0 + 1e-9 * rng.normal(size=(200, 33))
    for budget in (1, 3, 8, 20, 33):
        expected = [released_rule(list(row), budget) for row in e]
        np.testing.assert_allclose(chi2_weights(e, budget, ties="reference"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("a", [1e-200, 1e-305, 3e-7, 1.0, 12345.678, 1e200, 1e305])
def test_budget_form_does_not_see_scale(a):
    rng = np.random.default_rng(5)
    e, prior = rng.normal(size=(50, 9)), rng.uniform(0.1, 1, size=(50, 9))
    np.testing.assert_allclose(chi2_weights(e * a, 3, prior=prior), chi2_weights(e, 3, prior=prior), rtol=1e-12)
    np.testing.assert_allclose(chi2_weights(e * a, prior=prior, tau=0.3 * a), chi2_weights(e, prior=prior, tau=0.3))


def test_scale_by_a_power_of_two_changes_no_bit():
    e = np.random.default_rng(6).normal(size=(50, 9))
    for exponent in (-900, -1, 1, 900):
        scaled = np.ldexp(e, exponent)
        np.testing.assert_array_equal(chi2_weights(scaled, 4), chi2_weights(e, 4))
        tau = math.ldexp(0.3, exponent)
        np.testing.assert_array_equal(chi2_weights(scaled, tau=tau), chi2_weights(e, tau=0.3))


@pytest.mark.parametrize("b", [-1e6, -0.5, 1e6])
def test_weights_do_not_see_an_offset(b):
    e = np.random.default_rng(7).normal(size=(50, 9))
    np.testing.assert_allclose(chi2_weights(e + b, 3), chi2_weights(e, 3), atol=1e-8)
    np.testing.assert_allclose(chi2_weights(e + b, tau=0.3), chi2_weights(e, tau=0.3), atol=1e-8)


def test_full_range_of_float64_does_not_overflow():
    np.testing.assert_allclose(chi2_weights([1.7e308, 0.0, -1.7e308], 2), [2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(chi2_weights([5e-324, 0.0, 0.0], 2), [1, 0, 0])
    tiny = chi2_weights([3.0, 2.0, 1.0], 2, prior=[1e-320, 1e-320, 1.0])
    np.testing.assert_allclose(tiny, [2 / 3, 1 / 3, 0])


ENERGIES = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-100, 100, width=32))


@settings(max_examples=200, deadline=None)
@given(ENERGIES, st.integers(1, 45), st.booleans())
def test_properties_of_the_budget_form(e, budget, with_prior):
    prior = np.linspace(1, 2, len(e)) if with_prior else None
    q = chi2_weights(e, budget, prior=prior)
    p = np.full(len(e), 1.0) if prior is None else prior
    assert q.min() >= 0
    assert math.isclose(q.sum(), 1, rel_tol=1e-12)
    # Ties are within 1e-9 of the spread; so near to that, either is right.
    gap = e.max() - np.sort(e)[::-1][budget] if len(e) > budget else 0.0
    if gap > 2e-9 * np.ptp(e):
        assert np.count_nonzero(q) <= budget
    elif gap < 0.5e-9 * np.ptp(e) or gap == 0:
        assert np.count_nonzero(q) >= min(budget, len(e))
    order = np.argsort(e)
    if len(e) > budget:  # otherwise the weights are the prior, whatever the energies
        assert np.all(np.diff((q / p)[order]) >= -1e-12)


@settings(max_examples=200, deadline=None)
@given(ENERGIES, st.floats(1e-6, 1e6), st.booleans())
def test_properties_of_the_tau_form(e, tau, with_prior):
    prior = np.linspace(1, 2, len(e)) if with_prior else np.ones(len(e))
    q = chi2_weights(e, prior=prior, tau=tau)
    assert kkt_residual(q, e, prior / prior.sum(), tau) < 1e-10
    assert np.all(np.diff((q / prior)[np.argsort(e)]) >= -1e-12)
    stronger = chi2_weights(e, prior=prior, tau=2 * tau)
    assert np.count_nonzero(stronger) >= np.count_nonzero(q)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=11), st.integers(1, 5), st.floats(-1e3, 1e3))
def test_divergence_of_the_budget_form_is_its_closed_form(gaps, budget, lowest):
    e = lowest + np.cumsum([0, *gaps])  # no ties
    budget = min(budget, len(e) - 1)
    q = chi2_weights(e, budget)
    held = np.sort(e)[::-1][:budget] - np.sort(e)[::-1][budget]
    cv2 = np.var(held) / np.mean(held) ** 2
    uniform = np.full(len(e), 1 / len(e))
    assert math.isclose(chi2_divergence(q, uniform), len(e) / budget * (1 + cv2) - 1, rel_tol=1e-9)
    assert math.isclose(effective_sample_size(q), budget / (1 + cv2), rel_tol=1e-9)


def test_divergence_and_effective_sample_size_at_the_edges():
    q, p = [[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]], [[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]
    np.testing.assert_array_equal(chi2_divergence(q, p), [1.0, INF, 0.0])
    np.testing.assert_array_equal(effective_sample_size(q), [1.0, 2.0, 0.0])


def ragged_batch():
    """1 to 12 candidates, ties, NaN inside and as padding, one problem without any; wide enough for several sizes."""
    rng = np.random.default_rng(11)
    batch = np.full((300, 14), NAN)
    for row in batch:
        row[: rng.integers(1, 13)] = rng.normal()
    batch += np.where(rng.random(batch.shape) < 0.6, rng.normal(size=batch.shape), 0.0)
    batch[rng.random(batch.shape) < 0.1] = NAN
    batch[17] = NAN
    return batch, rng.uniform(0, 1, size=batch.shape) * (rng.random(batch.shape) < 0.9)


@pytest.mark.parametrize(
    "kwargs", [{"budget": 1}, {"budget": 3}, {"budget": 14}, {"budget": 99}, {"tau": 0.1}, {"tau": 50.0}]
)
@pytest.mark.parametrize("with_prior", [False, True])
def test_padded_batch_equals_row_by_row(kwargs, with_prior, monkeypatch):
    monkeypatch.setattr("lark_fast.kernels.chi2._BLOCK_CELLS", 14 * 7)  # 300 rows then take 43 blocks
    batch, priors = ragged_batch()
    usable = (~np.isnan(batch) & (priors > 0)).any(axis=1)
    if with_prior:
        batch = np.where(usable[:, None], batch, NAN)
    together = chi2_weights(batch, prior=priors if with_prior else None, **kwargs)
    for e, p, row in zip(batch, priors, together, strict=True):
        keep = ~np.isnan(e)
        alone = chi2_weights(e[keep], prior=p[keep] if with_prior else None, **kwargs)
        np.testing.assert_allclose(row[keep], alone, rtol=1e-13, atol=1e-300)
        assert np.all(row[~keep] == 0)
    sums = together.sum(axis=1)
    np.testing.assert_allclose(sums, ~np.isnan(batch).all(axis=1), rtol=1e-12)


def test_padded_batch_equals_row_by_row_in_reference_mode():
    batch, _ = ragged_batch()
    together = chi2_weights(batch, 3, ties="reference")
    np.testing.assert_allclose(together, [released_rule(list(e), 3) for e in batch], rtol=1e-12, atol=1e-12)


def test_shapes_types_and_untouched_inputs():
    assert chi2_weights([1, 2, 3]).shape == (3,)
    assert chi2_weights(np.array([[1, 2, 3]], dtype=np.int32)).dtype == np.float64
    assert chi2_weights(np.array([1, 2, 3], dtype=np.float32)).dtype == np.float64
    for shape in ((0,), (0, 5), (5, 0)):
        for kwargs in ({}, {"tau": 1.0}, {"ties": "reference"}, {"prior": np.ones(shape)}):
            assert chi2_weights(np.zeros(shape), **kwargs).shape == shape
    e, p = np.array([[3.0, NAN, 1.0, 2.0]]), np.array([1.0, 1.0, 0.0, 2.0])
    before = e.copy(), p.copy()
    np.testing.assert_array_equal(chi2_weights(e[:, ::-1], 1, prior=p[::-1])[:, ::-1], chi2_weights(e, 1, prior=p))
    np.testing.assert_array_equal(e, before[0])
    np.testing.assert_array_equal(p, before[1])
    np.testing.assert_array_equal(chi2_weights(e), chi2_weights(e, 3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"budget": 3, "tau": 1.0}, "budget or tau, not both"),
        ({"budget": 0}, "budget must be at least 1; got 0"),
        ({"budget": -2}, "budget must be at least 1"),
        ({"budget": 2.5}, "budget must be a whole number"),
        ({"tau": 0.0}, "tau must be a finite number above 0"),
        ({"tau": -1.0}, "tau must be"),
        ({"tau": NAN}, "tau must be"),
        ({"tau": INF}, "tau must be"),
        ({"ties": "fair"}, "ties must be one of exact, reference; got 'fair'"),
        ({"ties": "reference", "prior": [1, 1, 1]}, "ties='reference' has no prior"),
        ({"ties": "reference", "tau": 1.0}, "ties='reference' has no tau form"),
        ({"prior": [1, 1]}, r"prior must have the shape \(2, 3\) or \(3,\) of the energies; got \(2,\)"),
        ({"prior": [[1, 1, 1]]}, "prior must have the shape"),
        ({"prior": [1, -1, 1]}, r"prior: problem \(row\) 0, candidate \(column\) 1 is -1.0"),
        ({"prior": [[1, 1, 1], [1, 1, INF]]}, r"prior: problem \(row\) 1, candidate \(column\) 2 is inf"),
        ({"prior": [[1, 1, 1], [1, NAN, 1]]}, r"row\) 1, candidate \(column\) 1 is nan"),
        ({"prior": [[1, 1, 1], [0, 0, 0]]}, r"prior: problem \(row\) 1: 0 for every valid candidate"),
    ],
)
def test_bad_arguments_say_what_is_wrong(kwargs, message):
    with pytest.raises(ValueError, match=message):
        chi2_weights([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], **kwargs)


@pytest.mark.parametrize("energies", [1.0, np.zeros((2, 2, 2)), [[1.0], [1.0, 2.0]]])
def test_bad_shapes(energies):
    with pytest.raises(ValueError, match=r"axes|inhomogeneous"):
        chi2_weights(energies)
