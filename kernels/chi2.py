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

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lark_fast.kernels.chi2_operands import DEFAULT_BUDGET, TIES, Block, Floats, Problems, as_problems
from lark_fast.kernels.largest import UP_TO, Largest

__all__ = [
    "DEFAULT_BUDGET",
    "TIES",
    "Chi2Solution",
    "chi2_divergence",
    "chi2_solve",
    "chi2_weights",
    "critical_taus",
    "effective_sample_size",
]

# Two energies tie when they differ by at most this share of the spread (max - min) of their problem's valid energies.
TIE_SHARE_OF_SPREAD = 1e-9

# The reference's two absolute constants, used by ties="reference" only.
REFERENCE_STEP_BELOW_MINIMUM = 1e-8
REFERENCE_DEGENERATE = 1e-12

# Problems are worked on in blocks of about this many cells: the temporaries stay in the cache, whatever N is.
_BLOCK_CELLS = 1 << 17

Networks = dict[tuple[int, int, int], Largest]  # by K, R and how many are wanted; the last one serves again


@dataclass(frozen=True, slots=True, kw_only=True)
class Chi2Solution:
    """Weights of N problems and what they come to; numpy arrays, or tensors on the device of the energies.

    All but ``q`` are ``[N]``, or have no axis where one problem came as ``[K]``. A problem without a valid candidate
    has nu NaN, tau NaN (or the one that was given), and 0 for the rest.
    """

    q: Any  # in the shape of the energies: float64, or the energies' own dtype where they are floating tensors
    nu: Any  # float64, units of the energies: q_k = (p_k / tau) (e_k - nu)_+
    tau: Any  # float64, units of the energies
    support: Any  # int64: how many q are above 0
    effective_sample_size: Any  # float64: 1 / sum q^2
    chi2_divergence: Any  # float64: from the prior, normalised over the valid candidates


def chi2_solve(
    energies: Any,
    budget: Any = None,
    prior: Any = None,
    tau: Any = None,
    ties: str = "exact",
    *,
    offsets: Any = None,
    impl: str = "auto",
) -> Chi2Solution:
    """Maximise <q, e> - (tau/2) chi2(q || p) for each problem, and say what nu, tau and the solution's size are.

    Arrays or tensors: tensors give tensors on their device. Sums and differences are float64, and energies are compared
    as they are; a problem's numbers do not depend on the others.

    Args:
        energies: ``[K]`` for one problem, ``[N, K]`` for N, padded with NaN, or with ``offsets`` ``[M]``. NaN stands
            for "no candidate". K up to 4,096 (Triton) or as memory allows (numpy).
        budget: how many candidates shall hold weight: tau = T_budget. One number or ``[N]``; 3 when neither budget nor
            tau is given.
        prior: as the energies, or ``[K]`` for all problems of ``[N, K]``; not negative, of any sum: it is normalised
            over the valid candidates, those with an energy and a prior above 0. Ignored where the energy is NaN. None
            is uniform.
        tau: strength of the penalty, in the units of the energies, instead of a budget. One number or ``[N]``.
        ties: "exact" or "reference", as in ``chi2_weights``.
        offsets: ``[N + 1]`` whole numbers rising from 0 to M: problem n has the energies offsets[n], ...,
            offsets[n + 1] - 1. A problem may be empty.
        impl: "triton" (tensors on a GPU), "numpy" (a GPU's tensors travel to the host and back), or "auto": Triton on a
            CUDA device where it is installed, else numpy.

    Returns:
        Chi2Solution. In the budget form with ties="exact" nu = e_{B+1} and tau = T_B; a problem with at most B valid
        candidates has q = p, the limit nu = -inf, tau = inf; where the top B tie with the next one, the tied maximisers
        share by prior, the limit nu = max e, tau = 0. With ties="reference" nu and tau are what the released code's
        weights come to under the formula: nu is 1e-8 below the lowest where no candidate is left over; where that code
        calls a problem degenerate they are max e and 0.

    Raises:
        ValueError: as ``chi2_weights``; also offsets that do not rise from 0 to M, K beyond 4,096 with Triton, an impl
            that is unknown or cannot run here. On a GPU one number is awaited to know that nothing is wrong.
    """
    if impl not in ("auto", "triton", "numpy"):
        raise ValueError(f"impl={impl!r}: one of 'auto', 'triton', 'numpy'")
    if type(energies).__module__.partition(".")[0] == "torch":
        from lark_fast.kernels.chi2_tensors import solve_tensors  # imports torch, which arrays do not need

        return solve_tensors(energies, budget, prior, tau, ties, offsets, impl)
    if impl == "triton":
        raise ValueError("impl='triton' takes torch tensors; energies are none")
    problems = as_problems(energies, budget, prior, tau, ties, offsets)
    solution = _solve(problems)
    if not problems.single:
        return solution
    names = Chi2Solution.__dataclass_fields__
    return Chi2Solution(**{name: getattr(solution, name)[0] for name in names})


def chi2_weights(
    energies: ArrayLike,
    budget: int | ArrayLike | None = None,
    prior: ArrayLike | None = None,
    tau: float | ArrayLike | None = None,
    ties: str = "exact",
) -> Floats:
    """Weights that maximise <q, e> - (tau/2) chi2(q || p) for each problem, in float64: the q of ``chi2_solve``.

    Args:
        energies: ``[K]`` for one problem or ``[N, K]`` for N, padded with NaN. NaN stands for "no candidate".
        budget: how many candidates shall hold weight: tau = T_budget; one number or ``[N]``. 3 when neither budget nor
            tau is given.
        prior: ``[K]`` (for all problems) or ``[N, K]``, not negative, of any sum: it is normalised over the valid
            candidates, those with an energy and a prior above 0. Ignored where the energy is NaN. None is uniform.
        tau: strength of the penalty, in the units of the energies, instead of a budget; one number or ``[N]``.
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
    problems = as_problems(energies, budget, prior, tau, ties, None)
    weights = np.empty_like(problems.energies)
    networks: Networks = {}
    for block in problems.blocks(_BLOCK_CELLS):
        _weigh(block, weights[block.rows], networks)
    return weights[0] if problems.single else weights


def effective_sample_size(q: ArrayLike) -> Floats:
    """1 / sum_k q_k^2 over the last axis: ``[..., K]`` -> ``[...]``; 0 where no candidate holds weight."""
    q = np.asarray(q, dtype=np.float64)
    squares = np.einsum("...k,...k->...", q, q)  # several times faster than sum over short rows, as in what follows
    return np.divide(1.0, squares, out=np.zeros_like(squares), where=squares > 0)


def chi2_divergence(q: ArrayLike, p: ArrayLike) -> Floats:
    """chi2(q || p) = sum_k (q_k - p_k)^2 / p_k over the last axis: ``[..., K]`` twice -> ``[...]``.

    Entries with q_k = p_k = 0 add nothing; q_k > 0 where p_k = 0 makes it infinite.
    """
    q, p = np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64)
    terms = q - p
    terms *= terms
    if (p > 0).all():
        terms /= p
    else:
        beyond = np.where(q > 0, np.inf, 0.0)
        terms = np.where(p > 0, terms / np.where(p > 0, p, 1.0), beyond)
    return np.einsum("...k->...", terms)


def critical_taus(ranked: Floats, mass: Floats, tie: Floats | float = 0.0) -> Floats:
    """T_1, ..., T_{K-1}: the largest tau at which only the top m hold weight.

    Args:
        ranked: ``[N, K]`` energies, falling.
        mass: ``[N, K]`` P_m, the sums of the normalised priors of the first m.
        tie: gaps between neighbours up to this count as none, a number or ``[N, 1]``.

    Returns:
        ``[N, K - 1]``, rising in each row.
    """
    gaps = ranked[:, :-1] - ranked[:, 1:]
    gaps[gaps <= tie] = 0.0
    return np.cumsum(mass[:, :-1] * gaps, axis=1)


def _solve(problems: Problems) -> Chi2Solution:
    """All of ``Chi2Solution`` for checked problems."""
    n = problems.n
    solution = Chi2Solution(
        q=np.zeros_like(problems.energies),
        nu=np.full(n, np.nan),
        tau=np.full(n, np.nan) if problems.tau is None else np.broadcast_to(problems.tau, n).copy(),
        support=np.zeros(n, dtype=np.int64),
        effective_sample_size=np.zeros(n),
        chi2_divergence=np.zeros(n),
    )
    networks: Networks = {}
    for block in problems.blocks(_BLOCK_CELLS):
        weights = np.empty(block.energies.shape) if block.cells else solution.q[block.rows]
        solution.nu[block.rows], solution.tau[block.rows] = _weigh(block, weights, networks)
        if block.cells:
            cells, here = block.cells
            solution.q[cells[here]] = weights[here]
            weights[~here] = 0.0
        solution.support[block.rows] = np.einsum("nk->n", (weights > 0).astype(np.float64))
        solution.effective_sample_size[block.rows] = effective_sample_size(weights)
        solution.chi2_divergence[block.rows] = chi2_divergence(weights, _normalised_prior(block))
    return solution


def _normalised_prior(block: Block) -> Floats:
    """What the divergence is measured from, ``[R, K]``: the prior over the valid candidates, 0 elsewhere."""
    if block.full and block.prior is None:
        return np.full(block.energies.shape[1], 1 / block.energies.shape[1])
    valid = ~np.isnan(block.energies)
    if block.ties == "reference":
        valid &= block.energies != -np.inf
        here = block.cells[1] if block.cells else np.ones_like(valid)
        valid |= here & ~valid.any(axis=1, keepdims=True)  # which it weighs 1/K all the same
    p = valid.astype(np.float64)
    _normalise(p, block.prior)
    return p


def _weigh(block: Block, out: Floats, networks: Networks) -> tuple[Floats, Floats]:
    """A block's weights into ``out`` ``[R, K]``; returns nu and tau, ``[R]`` each."""
    if block.full is None:
        block.look()  # brings the energies into the cache, too
    if block.ties == "reference":
        return _reference_weights(block, out)
    return _budget_weights(block, out, networks) if block.tau is None else _tau_weights(block, out)


def _power_of_two_scale(largest_size: Floats) -> Floats | None:
    """Factors that bring numbers of magnitude ``largest_size`` near 1 without rounding, ``[R]`` -> ``[R]``.

    None when all are far enough from the ends of float64 as they are, which saves a pass over them.
    """
    if largest_size.max() < 2.0**500 and largest_size.min() > 2.0**-500:
        return None
    return np.ldexp(1.0, np.clip(-np.frexp(largest_size)[1], -1000, 1000))


def _normalise(weights: Floats, prior: Floats | None, total: Floats | None = None) -> Floats:
    """Multiply ``weights`` ``[R, K]`` by ``prior`` and make each row sum to 1, in place; rows of zeros stay zeros.

    ``total``: sums of the rows, where known and without a prior. Returns the sums before they were 1, ``[R]``, in which
    the prior's largest entry of the row counts as 1.
    """
    unit = None
    if prior is not None:
        # Relative to the largest prior that counts, so that a support of tiny priors does not underflow.
        held = np.where(weights > 0, prior, 0.0)
        unit = held.max(axis=1, keepdims=True)
        weights *= np.divide(held, unit, out=held, where=unit > 0)
    if total is None:
        total = np.einsum("nk->n", weights)
    total_or_1 = total if total.all() else np.where(total == 0, 1.0, total)
    weights *= (1.0 / total_or_1)[:, None]  # twice as fast as to divide
    if prior is None:
        return total
    largest_prior = prior.max(axis=1)
    return total * np.divide(unit[:, 0], largest_prior, out=np.zeros_like(total), where=largest_prior > 0)


def _budget_weights(block: Block, out: Floats, networks: Networks) -> tuple[Floats, Floats]:
    """The budget form with exact ties; arguments and result as ``_weigh``."""
    deepest = min(block.budget if isinstance(block.budget, int) else int(block.budget.max()), out.shape[1])
    top, n_valid = _order_statistics(block, deepest + 1, networks)
    energies, prior, budget = block.energies, block.prior, block.budget
    one_for_all = isinstance(budget, int)
    place = deepest if one_for_all else np.minimum(budget, deepest)
    row = np.arange(len(out))
    highest, nu = top[0], top[place] if one_for_all else top[place, row]
    lowest, is_bound = block.least, _ordinary(block.least, highest)
    if not is_bound:
        lowest = np.fmin.reduce(energies, axis=1)
    few = None
    if not block.full or deepest == out.shape[1]:
        few = nu == -np.inf  # no more candidates than the budget
        nu = np.where(few, highest, nu)
        highest, lowest, nu = (np.where(np.isfinite(x), x, 0.0) for x in (highest, lowest, nu))
    limit = few, highest, nu
    scale = None if is_bound else _power_of_two_scale(np.maximum(highest, -lowest))
    if scale is not None:
        energies = energies * scale[:, None]
        top, highest, lowest, nu = top * scale, highest * scale, lowest * scale, nu * scale
    tie = TIE_SHARE_OF_SPREAD * (highest - lowest)

    np.subtract(energies, nu[:, None], out=out)
    (np.maximum if block.full else np.fmax)(out, 0.0, out=out)  # fmax, which is slower: 0 for NaN
    total = None
    if prior is None and deepest < UP_TO:
        above = top[:deepest] - nu
        total = above.sum(axis=0) if one_for_all else np.maximum(above, 0.0).sum(axis=0)
    # Rows where the last one that the budget has room for ties with nu, or is not there.
    room = (top[place - 1] if one_for_all else top[place - 1, row]) - nu
    special = np.flatnonzero(room <= tie)
    if len(special) and is_bound:
        tie[special] = TIE_SHARE_OF_SPREAD * (highest[special] - energies[special].min(axis=1))
        special = special[room[special] <= tie[special]]
    if len(special):
        tie_here, e = tie[special, None], energies[special]
        all_of_them = np.zeros(len(special), dtype=bool) if few is None else few[special]
        flat = (highest - nu)[special] <= tie[special]
        reach = np.where(all_of_them[:, None], np.inf, tie_here)
        weights = out[special]
        weights[weights <= tie_here] = 0.0
        weights = np.where((all_of_them | flat)[:, None], highest[special, None] - e <= reach, weights)
        out[special] = weights
        if total is not None:
            total[special] = weights.sum(axis=1)
    # sum p (e - nu) with p over all valid candidates, of which ``_normalise`` has the numerator.
    tau = _normalise(out, prior, total) / _mass(prior, n_valid)
    if scale is not None:
        tau /= scale
    few, highest, nu = limit
    if len(special):
        nu, tau = nu.copy(), tau.copy()
        nu[special], tau[special] = np.where(flat, highest[special], nu[special]), np.where(flat, 0.0, tau[special])
    if few is not None:
        nu, tau = np.where(few, -np.inf, nu), np.where(few, np.inf, tau)
        nu[n_valid == 0] = tau[n_valid == 0] = np.nan
    return nu, tau


def _mass(prior: Floats | None, n_valid: int | NDArray[np.int64]) -> Floats | int | NDArray[np.int64]:
    """Sum of the valid candidates' priors, the largest of them counting as 1; 1 where there is none."""
    if prior is None:
        return np.maximum(n_valid, 1)
    largest_prior = prior.max(axis=1, keepdims=True)
    shares = np.divide(prior, largest_prior, out=np.zeros_like(prior), where=largest_prior > 0)
    return np.maximum(shares.sum(axis=1), 1.0)


def _ordinary(least: float, highest: Floats) -> bool:
    """Whether no row can need a scale, and a bound below all energies will do in place of each row's lowest.

    That is looked for where energies may tie, in the few rows that a spread up to the bound does not clear of it.
    """
    return least > -(2.0**500) and highest.max() < 2.0**500 and np.abs(highest).min() > 2.0**-500


def _order_statistics(block: Block, count: int, networks: Networks) -> tuple[Floats, int | NDArray[np.int64]]:
    """The largest energies, falling, ``[count, R]``, -inf where there are fewer; how many are valid, in each row."""
    r, k = block.energies.shape
    if count > UP_TO:
        rising = np.full((r, max(k, count)), -np.inf)
        rising[:, :k] = block.energies
        n_valid = k
        if not block.full:
            np.fmax(rising, -np.inf, out=rising)  # -inf for NaN
            n_valid = np.count_nonzero(rising > -np.inf, axis=1)
        rising.sort(axis=1)
        return rising.T[::-1][:count], n_valid

    if (k, r, count) not in networks:
        networks.clear()
        networks[k, r, count] = Largest(k, r, count)
    network = networks[k, r, count]
    network.load(block.energies)
    n_valid = k
    if not block.full:
        np.fmax(network.columns, -np.inf, out=network.columns)
        n_valid = np.count_nonzero(network.columns > -np.inf, axis=0)
    return network(), n_valid


def _tau_weights(block: Block, out: Floats) -> tuple[Floats, Floats]:
    """The tau form; arguments and result as ``_weigh``."""
    energies, tau = block.energies, block.tau
    valid = ~np.isnan(energies)
    p = valid.astype(np.float64)
    _normalise(p, block.prior)
    scale = _power_of_two_scale(np.abs(energies, out=np.zeros_like(energies), where=valid).max(axis=1))
    if scale is None:
        scale = np.ones(len(energies))
    with np.errstate(over="ignore"):
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
    threshold[:, 1:] = critical_taus(e_sorted, mass)
    m = (threshold < tau_scaled[:, None]).sum(axis=1) - 1  # the support's last column
    row = np.arange(len(e))
    lowest_held = e_sorted[row, m]
    above_nu = (tau_scaled - threshold[row, m]) / np.where(mass[row, m] > 0, mass[row, m], 1.0)
    out[:] = np.where(valid & (e >= lowest_held[:, None]), e - lowest_held[:, None] + above_nu[:, None], 0.0)
    _normalise(out, block.prior)
    with np.errstate(over="ignore"):
        nu = np.where(valid.any(axis=1), (lowest_held - above_nu) / scale, np.nan)
    return nu, np.broadcast_to(tau, len(e))


def _reference_weights(block: Block, out: Floats) -> tuple[Floats, Floats]:
    """The released code's rule, written for ``[R, K]`` and in its order of operations; uniform prior only.

    Arguments and result as ``_weigh``.
    """
    n, k = out.shape
    # What K is to a problem that is padded to another size.
    n_candidates = block.cells[1].sum(axis=1) if block.cells else np.full(n, k)
    e = np.where(np.isnan(block.energies), -np.inf, block.energies)
    order = np.argsort(-e, axis=1, kind="stable")  # ties keep the order of their indices
    descending = np.take_along_axis(e, order, axis=1)
    n_valid = (descending > -np.inf).sum(axis=1)
    size = np.minimum(n_valid, block.budget)
    held = np.arange(k) < size[:, None]

    row = np.arange(n)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # A running sum adds from left to right as a loop does; a pairwise one would differ in the last digits,
        # which the subtraction below would blow up.
        total = np.cumsum(np.where(held, descending, 0.0), axis=1)[:, -1]
        smallest = descending[row, np.maximum(size - 1, 0)]
        below = descending[row, np.minimum(size, k - 1)]
        nu = np.where(size < n_valid, below, smallest - REFERENCE_STEP_BELOW_MINIMUM)
        denominator = total / np.maximum(size, 1) - nu
        linear = (descending - nu[:, None]) / (denominator * size)[:, None]
        uniform = 1.0 / np.maximum(size, 1)[:, None]
        degenerate = denominator <= REFERENCE_DEGENERATE
        tau = np.where(degenerate, 0.0, denominator * size / np.maximum(n_valid, 1))
    top = np.where(degenerate[:, None], uniform, linear)
    top = np.where(held, top, 0.0)
    empty = n_valid == 0
    top[empty] = 1.0 / n_candidates[empty, None]
    np.put_along_axis(out, order, top, axis=1)
    return np.where(empty, np.nan, np.where(degenerate, descending[:, 0], nu)), np.where(empty, np.nan, tau)
