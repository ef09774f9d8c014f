"""Batches of selection problems: thousands of them against a convex solver, however they are laid out, and what is told
of each; arrays here, tensors in test_chi2_triton.py."""

import dataclasses
import math
import warnings

import numpy as np
import pytest

from lark_fast.kernels.chi2 import chi2_divergence, chi2_solve, chi2_weights, effective_sample_size
from lark_fast.kernels.chi2_operands import as_problems
from lark_fast.kernels.largest import UP_TO, Largest

NAN, INF = math.nan, math.inf
FIELDS = [field.name for field in dataclasses.fields(chi2_solve([1.0]))]


def many_problems(n, k, seed):
    """Energies and priors ``[n, k]`` with NaN: smooth, tied, all but tied, offset, one far ahead, one prior for all."""
    rng = np.random.default_rng(seed)
    e = rng.normal(size=(n, k))
    kind = np.arange(n) % 6
    e[kind == 1] = np.round(e[kind == 1])
    e[kind == 2] = 7.0 + 0.02 * e[kind == 2]
    e[kind == 3] **= 3
    e[kind == 4] = np.round(e[kind == 4]) + 1e-3 * np.round(3 * rng.normal(size=e[kind == 4].shape))
    e[rng.random(e.shape) < 0.15] = NAN
    e[:, 0] = np.where(np.isnan(e).all(axis=1), 0.0, e[:, 0])
    prior = rng.dirichlet(np.full(k, 0.7), size=n) + 1e-3
    prior[kind % 2 == 0] = 1.0
    return e, prior, rng


def solve_with_cvxpy(e, p, tau):
    """All problems as one program: the projections of y = q / sqrt(p), with a constraint a problem.

    e, p ``[n, k]`` with p summing to 1 over the candidates of a problem and 0 for what is none; tau ``[n]``.
    """
    cp = pytest.importorskip("cvxpy")
    from scipy.sparse import csr_array

    row, column = np.nonzero(p)
    root, energies = np.sqrt(p[row, column]), e[row, column]
    mean = np.bincount(row, p[row, column] * energies)
    target = root * (1 + (energies - mean[row]) / tau[row])
    y = cp.Variable(len(row))
    sums = csr_array((root, (row, np.arange(len(row)))))
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(y - target)), [sums @ y == 1, y >= 0])
    with warnings.catch_warnings():
        # At tau = T_m one bound is active with multiplier 0; there OSQP may stall at 1e-9, and says so.
        warnings.filterwarnings("ignore", "Solution may be inaccurate")
        problem.solve(solver=cp.OSQP, eps_abs=1e-10, eps_rel=1e-10, max_iter=4000, polishing=True)
    q = np.zeros_like(p)
    q[row, column] = root * y.value
    return q


def kkt_residuals(q, e, p, tau):
    """Largest violation of the optimality conditions of every problem, in units of max(tau, spread): ``[n]``."""
    valid = p > 0
    slope = np.where(valid, e - tau[:, None] * (q / np.where(valid, p, 1.0) - 1), NAN)
    held = np.where(q > 0, slope, NAN)
    multiplier = np.nanmax(held, axis=1)
    scale = np.maximum(tau, np.nanmax(np.where(valid, e, NAN), axis=1) - np.nanmin(np.where(valid, e, NAN), axis=1))
    uneven = (multiplier - np.nanmin(held, axis=1)) / scale
    left_out = np.maximum(np.nanmax(slope, axis=1) - multiplier, 0) / scale
    return np.max([np.abs(q.sum(axis=1) - 1), -np.minimum(q.min(axis=1), 0), uneven, left_out], axis=0)


# At the tau of a budget one bound is active with multiplier 0, which takes OSQP twenty times as long.
@pytest.mark.parametrize(("form", "n"), [("budget", 500), ("tau", 4000)])
def test_thousands_of_problems_solve_the_convex_program(form, n):
    e, prior, rng = many_problems(n, 9, seed=n)
    p = np.where(np.isnan(e), 0.0, prior)
    p /= p.sum(axis=1, keepdims=True)
    if form == "tau":
        given = {"tau": (np.nanmax(e, axis=1) - np.nanmin(e, axis=1) + 0.01) * 10 ** rng.uniform(-2, 1, size=len(e))}
    else:
        given = {"budget": rng.integers(1, 8, size=len(e))}
    solution = chi2_solve(e, prior=prior, **given)
    inside = np.isfinite(solution.tau) & (solution.tau > 0)  # elsewhere the program is a limit
    assert inside.sum() > n / 2
    q, energies, p, tau = solution.q[inside], np.nan_to_num(e[inside]), p[inside], solution.tau[inside]
    assert kkt_residuals(q, energies, p, tau).max() < 1e-9
    np.testing.assert_allclose(q, solve_with_cvxpy(energies, p, tau), rtol=0, atol=1e-8)
    by_formula = p / tau[:, None] * np.maximum(energies - solution.nu[inside, None], 0)
    np.testing.assert_allclose(q, by_formula, rtol=0, atol=1e-8)


def test_the_limits_of_the_budget_form():
    e = np.array([[3.0, 1.0, NAN, NAN], [2.0, 2.0, 2.0, 0.0], [NAN] * 4, [3.0, 1.0, 2.0, 1.0], [5.0, 4.0, 2.0, 1.0]])
    solution = chi2_solve(e, 2, prior=[1.0, 3.0, 4.0, 2.0])
    np.testing.assert_allclose(
        solution.q,
        [[0.25, 0.75, 0, 0], [1 / 8, 3 / 8, 4 / 8, 0], [0] * 4, [1 / 3, 0, 2 / 3, 0], [3 / 9, 6 / 9, 0, 0]],
        rtol=1e-15,
    )
    np.testing.assert_array_equal(solution.nu, [-INF, 2.0, NAN, 1.0, 2.0])
    np.testing.assert_allclose(solution.tau, [INF, 0.0, NAN, (1 * 2 + 4 * 1) / 10, (1 * 3 + 3 * 2) / 10], rtol=1e-15)
    np.testing.assert_array_equal(solution.support, [2, 3, 0, 2, 2])
    np.testing.assert_allclose(solution.effective_sample_size, [1.6, 64 / 26, 0, 9 / 5, 9 / 5], rtol=1e-15)
    np.testing.assert_allclose(solution.chi2_divergence[[0, 2]], 0, atol=1e-15)
    np.testing.assert_allclose(solution.chi2_divergence[1], 10 / 8 - 1, rtol=1e-14)


def test_the_reference_mode_tells_its_threshold():
    e = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [5.0, NAN, -INF], [NAN] * 3, [4.0, 2.0, NAN]])
    solution = chi2_solve(e, 2, ties="reference")
    np.testing.assert_allclose(solution.nu, [1.0, 1.0, 5.0 - 1e-8, NAN, 2.0 - 1e-8], rtol=1e-15)
    np.testing.assert_allclose(solution.tau, [1.0, 0.0, 1e-8, NAN, 1.0 + 1e-8], rtol=1e-7)
    np.testing.assert_array_equal(solution.support, [2, 2, 1, 3, 2])
    np.testing.assert_allclose(solution.chi2_divergence[[0, 3]], [3 * (1 / 9 + 1 / 9), 0], atol=1e-15)


EACH = np.arange(300) % 9 + 1


@pytest.mark.parametrize("kwargs", [{}, {"budget": EACH}, {"tau": 0.4}, {"tau": EACH / 5}, {"ties": "reference"}])
@pytest.mark.parametrize("with_prior", [False, True])
def test_what_is_told_follows_from_the_weights(kwargs, with_prior):
    if with_prior and "ties" in kwargs:
        pytest.skip("the released code has no prior")
    e, prior, _ = many_problems(300, 7, seed=3)
    solution = chi2_solve(e, prior=prior if with_prior else None, **kwargs)
    np.testing.assert_array_equal(solution.q, chi2_weights(e, prior=prior if with_prior else None, **kwargs))
    p = np.where(np.isnan(e), 0.0, prior if with_prior else 1.0)
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(solution.support, (solution.q > 0).sum(axis=1))
    np.testing.assert_allclose(solution.effective_sample_size, effective_sample_size(solution.q), rtol=1e-15)
    np.testing.assert_allclose(solution.chi2_divergence, chi2_divergence(solution.q, p), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"budget": 1},
        {"budget": 3},
        {"budget": UP_TO},
        {"budget": "each"},
        {"tau": 0.2},
        {"tau": "each"},
        {"ties": "reference", "budget": "each"},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_prior", [False, True])
def test_offsets_padding_and_one_by_one_are_the_same(kwargs, with_prior, monkeypatch):
    if with_prior and "ties" in kwargs:
        pytest.skip("the released code has no prior")
    monkeypatch.setattr("lark_fast.kernels.chi2._BLOCK_CELLS", 14 * 7)
    rng = np.random.default_rng(4)
    sizes = rng.integers(0, 15, size=70)
    offsets = np.concatenate([[0], sizes.cumsum()])
    flat = np.where(rng.random(offsets[-1]) < 0.5, rng.normal(size=offsets[-1]), rng.integers(0, 3, size=offsets[-1]))
    flat[rng.random(len(flat)) < 0.1] = NAN
    flat[offsets[7] : offsets[8]] = NAN
    prior = rng.uniform(0.1, 1.0, size=len(flat))
    each = {"budget": rng.integers(1, 12, size=len(sizes)), "tau": 10 ** rng.uniform(-2, 2, size=len(sizes))}
    kwargs = {name: each[name] if value == "each" else value for name, value in kwargs.items()}
    together = chi2_solve(flat, offsets=offsets, prior=prior if with_prior else None, **kwargs)

    here = np.arange(sizes.max()) < sizes[:, None]
    padded, padded_prior = np.full(here.shape, NAN), np.full(here.shape, NAN)
    padded[here], padded_prior[here] = flat, prior
    by_padding = chi2_solve(padded, prior=padded_prior if with_prior else None, **kwargs)
    counted = ~np.isnan(padded).all(axis=1) if "ties" in kwargs else sizes >= 0  # there padding counts
    for n, size in enumerate(sizes):
        own = slice(offsets[n], offsets[n + 1])
        settings = {name: value[n] if np.ndim(value) else value for name, value in kwargs.items()}
        alone = chi2_solve(flat[own], prior=prior[own] if with_prior else None, **settings)
        np.testing.assert_allclose(together.q[own], alone.q, rtol=1e-13, atol=1e-300)
        if counted[n]:
            np.testing.assert_allclose(by_padding.q[n, :size], alone.q, rtol=1e-13, atol=1e-300)
        for name in FIELDS[1:]:
            value = getattr(alone, name)
            np.testing.assert_allclose(getattr(together, name)[n], value, rtol=1e-12, atol=1e-13, err_msg=name)
            if counted[n]:
                np.testing.assert_allclose(getattr(by_padding, name)[n], value, rtol=1e-12, atol=1e-13, err_msg=name)


def test_nu_where_all_that_count_tie():
    # What stands for the missing one ties with them, and must not take part.
    solution = chi2_solve([[NAN, 2.0, 2.0, 2.0], [2.0, 2.0, NAN, 2.0]], tau=0.2)
    np.testing.assert_allclose(solution.nu, 1.8, rtol=1e-15)


@pytest.mark.parametrize("k", [1, 2, 33, 4096])
def test_sizes_of_problems(k):
    rng = np.random.default_rng(k)
    e = rng.normal(size=(5, k))
    descending = -np.sort(-e, axis=1)
    for budget in {1, 3, min(k, 9), max(1, k - 1), k, 5000}:
        solution = chi2_solve(e, budget)
        if budget >= k:
            np.testing.assert_allclose(solution.q, 1 / k, rtol=1e-15)
            continue
        np.testing.assert_array_equal(solution.nu, descending[:, budget])
        above = np.maximum(e - solution.nu[:, None], 0)
        np.testing.assert_allclose(solution.q, above / above.sum(axis=1, keepdims=True), rtol=1e-12)
        np.testing.assert_allclose(solution.tau, above.mean(axis=1), rtol=1e-12)
        np.testing.assert_array_equal(solution.support, budget)
    solution = chi2_solve(e, tau=0.3)
    np.testing.assert_allclose(np.maximum(e - solution.nu[:, None], 0).mean(axis=1), 0.3, rtol=1e-12)


def test_nothing_to_solve():
    for kwargs in ({}, {"tau": 2.0}, {"ties": "reference"}):
        for shape in ((0, 5), (3, 0)):
            solution = chi2_solve(np.zeros(shape), **kwargs)
            assert solution.q.shape == shape
            assert solution.support.tolist() == [0] * shape[0]
        solution = chi2_solve([], offsets=[0, 0, 0], **kwargs)
        assert solution.q.shape == (0,)
        assert np.isnan(solution.nu).all()
        assert solution.tau.tolist() == [2.0] * 2 if "tau" in kwargs else np.isnan(solution.tau).all()
        assert chi2_solve([], offsets=[0], **kwargs).nu.shape == (0,)
    one = chi2_solve([2.0, 1.0, 0.0], 1)
    assert (one.q.tolist(), one.nu, one.tau, one.support) == ([1.0, 0.0, 0.0], 1.0, 1 / 3, 1)
    assert one.nu.shape == ()


PAIR = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize(
    ("energies", "kwargs", "message"),
    [
        ([[1.0, 2.0], [INF, 0.0]], {}, r"energies: problem \(row\) 1, candidate \(column\) 0 is inf; must be finite"),
        ([[1.0, 2.0], [-INF, NAN]], {"tau": [1.0, 2.0]}, r"problem \(row\) 1, candidate \(column\) 0 is -inf"),
        ([[1.0, -INF]], {"prior": [1.0, 0.0]}, r"candidate \(column\) 1 is -inf"),
        ([1.0, 2.0, INF], {"offsets": [0, 1, 3]}, "energies: problem 1, candidate 1 is inf"),
        ([INF] * 12, {"budget": 11}, "candidate 0 is inf"),
        (PAIR, {"budget": [1, 0]}, "budget must be at least 1; got 0 for problem 1"),
        (PAIR, {"budget": [1, 2, 3]}, r"budget must be one number or one a problem, \(2,\); got the shape \(3,\)"),
        (PAIR, {"budget": [1.0, 2.0]}, "budget must be a whole number for every problem; got float64"),
        ([1.0, 2.0], {"budget": [1, 2]}, r"budget must be one number or one a problem, \(1,\)"),
        (PAIR, {"tau": [1.0, 0.0]}, "tau must be a finite number above 0; got 0.0 for problem 1"),
        (PAIR, {"tau": [NAN, 1.0]}, "got nan for problem 0"),
        (PAIR, {"tau": [1.0]}, r"tau must be one number or one a problem, \(2,\); got the shape \(1,\)"),
        (PAIR, {"budget": 1, "tau": [1.0, 1.0]}, "budget or tau, not both"),
        ([1.0, 2.0], {"offsets": [1, 2]}, "offsets must rise from 0 to M = 2; these go from 1 to 2"),
        ([1.0, 2.0], {"offsets": [0, 1]}, "these go from 0 to 1"),
        ([1.0, 2.0], {"offsets": [0, 3]}, "these go from 0 to 3"),
        ([1.0, 2.0], {"offsets": [0, 2, 1, 2]}, "these go from 0 to 2, falling on the way"),
        ([1.0, 2.0], {"offsets": []}, "at least one"),
        ([1.0, 2.0], {"offsets": [[0, 2]]}, r"whole numbers of shape \(1, 2\)"),
        ([1.0, 2.0], {"offsets": [0.0, 2.0]}, "numbers that are not whole"),
        (PAIR, {"offsets": [0, 6]}, r"energies with offsets must have the axis \(M,\); got 2 axes"),
        ([1.0, 2.0], {"offsets": [0, 2], "prior": [1.0]}, r"prior must have the shape \(2,\)"),
        ([1.0, 2.0, 3.0], {"offsets": [0, 1, 3], "prior": [1.0, -1.0, 1.0]}, "prior: problem 1, candidate 0 is -1.0"),
        ([1.0, 2.0, 3.0], {"offsets": [0, 1, 3], "prior": [1.0, 0.0, 0.0]}, "prior: problem 1: 0 for every valid"),
    ],
)
def test_bad_arguments_say_what_is_wrong(energies, kwargs, message):
    with pytest.raises(ValueError, match=message):
        chi2_solve(energies, **kwargs)


def test_sums_that_overflow_are_no_infinite_energies():
    huge = np.array([[1.7e308, 1.6e308, 0.0], [-1.7e308, -1.7e308, 1.0]])
    np.testing.assert_allclose(chi2_solve(huge, 1).q, [[1, 0, 0], [0, 0, 1]])
    assert next(as_problems(huge, 1, None, None, "exact", None).blocks(99)).look()


@pytest.mark.parametrize("count", range(1, UP_TO + 1))
def test_the_largest_numbers_of_columns(count):
    rng = np.random.default_rng(count)
    for k in (1, 2, 3, 7, 8, 9, 33, 40, 65):
        network = Largest(k, 50, count)
        for _ in range(2):
            rows = rng.integers(0, 9, size=(50, k)).astype(float)
            rows[rng.random(rows.shape) < 0.1] = -INF
            network.load(rows)
            expected = np.full((count, 50), -INF)
            expected[:k] = -np.sort(-rows.T, axis=0)[:count]
            np.testing.assert_array_equal(network(), expected)
