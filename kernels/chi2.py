"""Chi-squared regularised selection weights in closed form, many problems at once (LARK, arXiv 2605.30651, section 3).

For one problem with energies e, prior p (p_k > 0, sum 1) and tau > 0,

    max_q  <q, e> - (tau/2) chi2(q || p)   over the simplex,   chi2(q || p) = sum_k (q_k - p_k)^2 / p_k.

The objective is strictly concave, so the KKT conditions are necessary and sufficient. With lambda for sum_k q_k = 1 and
mu_k >= 0 for q_k >= 0, stationarity reads e_k - tau (q_k / p_k - 1) - lambda + mu_k = 0. Write nu = lambda - tau:
where q_k > 0, mu_k = 0 gives q_k = (p_k / tau) (e_k - nu); where q_k = 0, mu_k = nu - e_k must not be negative. Hence

    q_k = (p_k / tau) (e_k - nu)_+   with the nu that solves   sum_k p_k (e_k - nu)_+ = tau.

The left side falls strictly in nu below max e, so nu is unique. With e sorted downwards, nu = e_{m+1} gives
T_m = sum_{k <= m} p_k (e_k - e_{m+1}), which grows with m; so exactly the top m hold weight iff T_{m-1} < tau <= T_m.
With P_m = p_1 + ... + p_m, T_m = T_{m-1} + P_m (e_m - e_{m+1}): a sum of terms that are not negative, which is what is
computed here, because sum_{k <= m} p_k e_k - P_m nu would cancel.

The budget form takes tau = T_B, so nu = e_{B+1}: the largest tau that keeps B candidates. Its weights do not change
under e -> a e + b with a > 0, which is why the constant kappa of g_hat never has to be known.
"""

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

DEFAULT_BUDGET = 3
TIES = ("exact", "reference")

# Two energies tie when they differ by at most this share of the spread (max - min) of their problem's valid energies.
TIE_SHARE_OF_SPREAD = 1e-9

# The reference's two absolute constants, used by ties="reference" only.
_REFERENCE_STEP_BELOW_MINIMUM = 1e-8
_REFERENCE_DEGENERATE = 1e-12

# Rows are worked on in blocks of about this many cells: the temporaries stay in the cache, whatever N is.
_BLOCK_CELLS = 1 << 17


def chi2_weights(
    energies: ArrayLike,
    budget: int | None = None,
    prior: ArrayLike | None = None,
    tau: float | None = None,
    ties: str = "exact",
) -> Floats:
    """Weights that maximise <q, e> - (tau/2) chi2(q || p) for each problem, in float64.

    Args:
        energies: ``[K]`` for one problem or ``[N, K]`` for N, padded with NaN. NaN stands for "no candidate".
        budget: how many candidates shall hold weight: tau = T_budget. 3 when neither budget nor tau is given.
        prior: ``[K]`` (for all problems) or ``[N, K]``, not negative, of any sum: it is normalised over the valid
            candidates, those with an energy and a prior above 0. Ignored where the energy is NaN. None is uniform.
        tau: strength of the penalty, in the units of the energies, instead of a budget.
        ties: "exact" or "reference".

    Returns:
        Weights in the shape of ``energies``. Each problem's sum to 1, or are all 0 when it has no valid candidate.

    In the budget form with ties="exact", a problem with at most ``budget`` valid candidates gets its prior; when the
    top ``budget`` tie with the next one, all tied maximisers share by prior (more than ``budget`` of them); a candidate
    that otherwise ties with the next one gets 0. ties="reference" follows the method's released code to 1e-12 instead:
    uniform prior, absolute thresholds, the first by index among degenerate ones, 1/K when every energy is NaN (K counts
    padding, so pass such problems unpadded), -inf taken for NaN, NaN weights after +inf.

    Raises:
        ValueError: budget and tau together, either out of range, a wrong shape, an unusable prior, an infinite energy
            (ties="exact"), a prior or tau with ties="reference".
    """
    problems, shape = _as_problems(energies)
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}; got {ties!r}")
    if budget is not None and tau is not None:
        raise ValueError("give budget or tau, not both: the budget form sets tau itself")
    if tau is not None:
        tau = _positive_tau(tau)
    else:
        budget = _positive_budget(DEFAULT_BUDGET if budget is None else budget)
    if ties == "reference" and (prior is not None or tau is not None):
        name = "prior" if prior is not None else "tau form"
        raise ValueError(f"ties='reference' has no {name}: the released code knows a budget and uniform priors only")
    if ties == "exact":
        _reject_infinite(problems, shape)
    priors = None if prior is None else _as_priors(prior, problems, shape)

    weights = np.empty_like(problems)
    rows = max(1, _BLOCK_CELLS // max(1, problems.shape[1]))
    for start in range(0, len(problems) if weights.size else 0, rows):
        block = slice(start, start + rows)
        e, p = problems[block], None
        if priors is not None:
            p = priors[block]
            e = np.where(p > 0, e, np.nan)
        if ties == "reference":
            weights[block] = _reference_weights(e, budget)
        elif tau is None:
            weights[block] = _budget_weights(e, p, budget)
        else:
            weights[block] = _tau_weights(e, p, tau)
    return weights.reshape(shape)


def effective_sample_size(q: ArrayLike) -> Floats:
    """1 / sum_k q_k^2 over the last axis: ``[..., K]`` -> ``[...]``; 0 where no candidate holds weight."""
    squares = np.square(np.asarray(q, dtype=np.float64)).sum(axis=-1)
    return np.divide(1.0, squares, out=np.zeros_like(squares), where=squares > 0)


def chi2_divergence(q: ArrayLike, p: ArrayLike) -> Floats:
    """chi2(q || p) = sum_k (q_k - p_k)^2 / p_k over the last axis: ``[..., K]`` twice -> ``[...]``.

    Entries with q_k = p_k = 0 add nothing; q_k > 0 where p_k = 0 makes it infinite.
    """
    q, p = np.broadcast_arrays(np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64))
    terms = np.where(q > 0, np.inf, 0.0)
    np.divide(np.square(q - p), p, out=terms, where=p > 0)
    return terms.sum(axis=-1)


def _as_problems(energies: ArrayLike) -> tuple[Floats, tuple[int, ...]]:
    """``[N, K]`` view of the energies, and the shape they came in."""
    array = np.asarray(energies, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise ValueError(f"energies must have the axes (K,) or (N, K); got {array.ndim} axes, shape {array.shape}")
    return np.atleast_2d(array), array.shape


def _positive_budget(budget: Any) -> int:
    try:
        count = operator.index(budget)
    except TypeError:
        raise ValueError(f"budget must be a whole number; got {budget!r}") from None
    if count < 1:
        raise ValueError(f"budget must be at least 1; got {count}")
    return count


def _positive_tau(tau: Any) -> float:
    value = float(tau)
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"tau must be a finite number above 0; got {tau!r}")
    return value


def _where(row: int, column: int, shape: tuple[int, ...]) -> str:
    return f"candidate {column}" if len(shape) == 1 else f"problem (row) {row}, candidate (column) {column}"


def _reject_infinite(problems: Floats, shape: tuple[int, ...]) -> None:
    infinite = np.isinf(problems)
    if infinite.any():
        row, column = np.argwhere(infinite)[0]
        raise ValueError(f"energies: {_where(row, column, shape)} is {problems[row, column]}; must be finite or NaN")


def _as_priors(prior: ArrayLike, problems: Floats, shape: tuple[int, ...]) -> Floats:
    """``[N, K]`` priors, checked where there is an energy, 0 elsewhere."""
    array = np.asarray(prior, dtype=np.float64)
    if array.shape not in (shape, shape[-1:]):
        allowed = " or ".join(str(s) for s in dict.fromkeys((shape, shape[-1:])))
        raise ValueError(f"prior must have the shape {allowed} of the energies; got {array.shape}")
    valid = ~np.isnan(problems)
    priors = np.where(valid, array, 0.0)
    wrong = ~(np.isfinite(priors) & (priors >= 0))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"prior: {_where(row, column, shape)} is {priors[row, column]}; priors must be finite and not negative"
        )
    empty = valid.any(axis=1) & ~priors.any(axis=1)
    if empty.any():
        name = "" if len(shape) == 1 else f"problem (row) {np.flatnonzero(empty)[0]}: "
        raise ValueError(f"prior: {name}0 for every valid candidate; at least one must be above 0")
    return priors


def _power_of_two_scale(largest: Floats) -> Floats | None:
    """Factors that bring numbers of magnitude ``largest`` near 1 without rounding, ``[N]`` -> ``[N]``.

    None when all are far enough from the ends of float64 as they are, which saves a pass over them.
    """
    if not ((largest > 2.0**500) | ((largest < 2.0**-500) & (largest > 0))).any():
        return None
    return np.ldexp(1.0, np.clip(-np.frexp(largest)[1], -1000, 1000))


def _normalised(weights: Floats, prior: Floats | None) -> Floats:
    """``weights`` (overwritten) times ``prior``, made to sum to 1 in each row; ``[N, K]``. Rows of zeros stay zeros."""
    if prior is not None:
        # Relative to the largest prior that counts, so that a support of tiny priors does not underflow.
        held = np.where(weights > 0, prior, 0.0)
        largest = held.max(axis=1, keepdims=True)
        weights *= np.divide(held, largest, out=held, where=largest > 0)
    total = np.einsum("nk->n", weights)  # several times faster than sum for short rows
    total[total == 0] = 1.0
    weights /= total[:, None]
    return weights


def _budget_weights(energies: Floats, prior: Floats | None, budget: int) -> Floats:
    """The budget form with exact ties, for ``[N, K]`` energies, NaN where there is no valid candidate."""
    ascending = np.sort(energies, axis=1)  # NaN comes last
    n_valid = _count_valid(ascending)
    few = n_valid <= budget

    row = np.arange(len(energies))
    last = np.maximum(n_valid - 1, 0)
    highest, lowest, nu = ascending[row, last], ascending[:, 0], ascending[row, np.maximum(last - budget, 0)]
    scale = _power_of_two_scale(np.maximum(np.abs(highest), np.abs(lowest)))
    if scale is not None:
        energies = energies * scale[:, None]
        highest, lowest, nu = highest * scale, lowest * scale, nu * scale
    tie = TIE_SHARE_OF_SPREAD * (highest - lowest)

    weights = energies - nu[:, None]
    weights *= weights > tie[:, None]
    flat = np.flatnonzero(few | (highest - nu <= tie))
    if len(flat):
        depth = highest[flat, None] - energies[flat]
        reach = np.where(few[flat], np.inf, tie[flat])
        weights[flat] = depth <= reach[:, None]
    if n_valid.min() < energies.shape[1]:
        weights[np.isnan(weights)] = 0.0
    return _normalised(weights, prior)


def _count_valid(ascending: Floats) -> NDArray[np.int64]:
    """How many numbers each row holds, ``[N]``, for rows sorted with NaN last."""
    k = ascending.shape[1]
    if not np.isnan(ascending[:, -1]).any():
        return np.full(len(ascending), k)
    return k - np.isnan(ascending).sum(axis=1)


def _tau_weights(energies: Floats, prior: Floats | None, tau: float) -> Floats:
    """The tau form, for ``[N, K]`` energies, NaN where there is no valid candidate."""
    valid = ~np.isnan(energies)
    p = _normalised(valid.astype(np.float64), prior)
    scale = _power_of_two_scale(np.abs(energies, out=np.zeros_like(energies), where=valid).max(axis=1))
    if scale is None:
        scale = np.ones(len(energies))
    # Beyond these bounds the weights do not change any more, and nothing below leaves the range of float64.
    tau_scaled = np.clip(tau * np.minimum(scale, 2.0**1000 / tau), 2.0**-1000, 2.0**1000)

    # Candidates that do not count take part as copies of the lowest one with prior 0: they change no sum.
    e = np.where(valid, energies * scale[:, None], np.inf)
    lowest = e.min(axis=1, keepdims=True)
    e = np.where(valid, e, np.where(np.isfinite(lowest), lowest, 0.0))
    order = np.argsort(-e, axis=1)
    e_sorted = np.take_along_axis(e, order, axis=1)
    mass = np.cumsum(np.take_along_axis(p, order, axis=1), axis=1)

    threshold = np.zeros_like(e)  # T_{m-1} in column m-1
    np.cumsum(mass[:, :-1] * (e_sorted[:, :-1] - e_sorted[:, 1:]), axis=1, out=threshold[:, 1:])
    m = ((threshold < tau_scaled[:, None]) & (mass > 0)).sum(axis=1) - 1  # the support's last column
    row = np.arange(len(e))
    lowest_held = e_sorted[row, m]
    above_nu = (tau_scaled - threshold[row, m]) / np.where(mass[row, m] > 0, mass[row, m], 1.0)
    weights = np.where(valid & (e >= lowest_held[:, None]), e - lowest_held[:, None] + above_nu[:, None], 0.0)
    return _normalised(weights, prior)


def _reference_weights(energies: Floats, budget: int) -> Floats:
    """The released code's rule, written for ``[N, K]`` and in its order of operations; uniform prior only."""
    n, k = energies.shape
    e = np.where(np.isnan(energies), -np.inf, energies)
    order = np.argsort(-e, axis=1, kind="stable")  # ties keep the order of their indices
    descending = np.take_along_axis(e, order, axis=1)
    n_valid = (descending > -np.inf).sum(axis=1)
    size = np.minimum(n_valid, budget)
    held = np.arange(k) < size[:, None]

    row = np.arange(n)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # A running sum adds from left to right as a loop does; a pairwise one would differ in the last digits,
        # which the subtraction below would blow up.
        total = np.cumsum(np.where(held, descending, 0.0), axis=1)[:, -1]
        smallest = descending[row, np.maximum(size - 1, 0)]
        below = descending[row, np.minimum(size, k - 1)]
        nu = np.where(size < n_valid, below, smallest - _REFERENCE_STEP_BELOW_MINIMUM)
        denominator = total / np.maximum(size, 1) - nu
        linear = (descending - nu[:, None]) / (denominator * size)[:, None]
        uniform = 1.0 / np.maximum(size, 1)[:, None]
    top = np.where(denominator[:, None] <= _REFERENCE_DEGENERATE, uniform, linear)
    top = np.where(held, top, 0.0)
    top[n_valid == 0] = 1.0 / k

    weights = np.empty_like(e)
    np.put_along_axis(weights, order, top, axis=1)
    return weights
