"""From a trajectory's nll and Brier score to its learnability: rho and g_hat (LARK, arXiv 2605.30651).

Let a student be trained by gradient flow on L_q(theta) = sum_k q_k nll_k(theta), the q-weighted loss of one problem's
candidates. Its relative rate of decay is

    R(q) = -d/dt log L_q = |grad L_q|^2 / L_q.

Assume (the paper's two assumptions) that gradients of different trajectories are orthogonal and that
|grad nll_k|^2 = kappa * brier_k. Then |grad L_q|^2 = kappa * sum_k q_k^2 brier_k, and

    dR/dq_k = kappa * ( 2 q_k brier_k / L_q  -  nll_k * sum_i q_i^2 brier_i / L_q^2 ).

At uniform q = 1/K, with S = sum_i nll_i (so L_q = S/K), rho_i = brier_i / nll_i, brier_i = rho_i nll_i:

    dR/dq_k = kappa * ( 2 brier_k / S - nll_k * sum_i brier_i / S^2 )
            = kappa * (nll_k / S) * ( 2 rho_k - sum_i rho_i nll_i / S )   =  kappa * g_hat_k.

The factor 2 is the square of q_k in |grad L_q|^2. kappa is common to all candidates and cancels in the selection.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

NEGLIGIBLE_NLL = 1e-30


def rho(nll: ArrayLike, brier: ArrayLike) -> NDArray[np.float64]:
    """The learnability factor's proxy brier / nll, and 0 where nll <= 1e-30.

    Args:
        nll: mean negative log-likelihood of each trajectory, nats, any shape.
        brier: mean Brier score of each trajectory, the same shape.

    Returns:
        An array of that shape; NaN where an input is NaN.
    """
    nll, brier = np.asarray(nll, np.float64), np.asarray(brier, np.float64)
    negligible = nll <= NEGLIGIBLE_NLL
    return np.where(negligible, 0.0, brier / np.where(negligible, 1.0, nll))


def g_hat(nll: ArrayLike, brier: ArrayLike, problem: ArrayLike) -> NDArray[np.float64]:
    """The learnability score that ranks the candidates of each problem.

    g_hat_k = (nll_k / S) (2 rho_k - sum_i rho_i nll_i / S) with S = sum_i nll_i over the candidates of k's problem.

    Args:
        nll: ``[N]`` mean negative log-likelihood of each trajectory, nats.
        brier: ``[N]`` mean Brier score of each trajectory.
        problem: ``[N]`` problem of each trajectory, numbers or strings, in any order.

    Returns:
        ``[N]`` float64. NaN where S <= 1e-30. A trajectory whose nll or brier is not finite gets NaN and is left out of
        its problem's sums.

    Raises:
        ValueError: the three are not one-dimensional and of one length.
    """
    nll, brier, groups = np.asarray(nll, np.float64), np.asarray(brier, np.float64), np.asarray(problem)
    if not nll.ndim == 1 or not nll.shape == brier.shape == groups.shape:
        raise ValueError(f"nll, brier and problem are [N] each, not {nll.shape}, {brier.shape} and {groups.shape}")
    members = np.unique(groups, return_inverse=True)[1]
    valid = np.isfinite(nll) & np.isfinite(brier)
    nll, brier = np.where(valid, nll, 0.0), np.where(valid, brier, 0.0)
    own_rho = rho(nll, brier)
    total, rho_nll = _sum_by(members, nll), _sum_by(members, own_rho * nll)
    usable = valid & (total > NEGLIGIBLE_NLL)
    total = np.where(usable, total, 1.0)
    return np.where(usable, nll / total * (2.0 * own_rho - rho_nll / total), np.nan)


def g_hat_se(
    nll: ArrayLike,
    brier: ArrayLike,
    problem: ArrayLike,
    nll_se: ArrayLike,
    brier_se: ArrayLike,
    nll_brier_cov: ArrayLike,
    *,
    origin: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Standard error of each g_hat whose nll and Brier scores are estimates (``head_sampling``), to first order.

    With S = sum_i nll_i and B = sum_i brier_i (as rho_i nll_i = brier_i), g_hat_k = 2 brier_k / S - nll_k B / S^2, so

        d g_hat_k / d nll_i   = 2 (nll_k B / S - brier_k) / S^2 - [i = k] B / S^2
        d g_hat_k / d brier_i = -nll_k / S^2                    + [i = k] 2 / S

    and its variance is that of the sum of these times the errors. Errors of different trajectories are independent,
    those of one trajectory's two scores are not, and those of trajectories with the same tokens are the same. It is of
    one g_hat by itself: two of a problem share the errors of S and B, so their difference may be surer than both.

    Args:
        nll, brier, problem: see ``g_hat``.
        nll_se, brier_se: ``[N]`` standard errors.
        nll_brier_cov: ``[N]`` covariances of the two errors.
        origin: ``[N]`` for each trajectory, the number of the first one of its problem with the same tokens. None: no
            two are alike.

    Returns:
        ``[N]`` float64; NaN where g_hat is.
    """
    members = np.unique(np.asarray(problem), return_inverse=True)[1]
    usable = np.isfinite(g_hat(nll, brier, problem))
    columns = (nll, brier, nll_se, brier_se, nll_brier_cov)
    nll, brier, nll_se, brier_se, both = (np.where(usable, np.asarray(x, np.float64), 0.0) for x in columns)
    S, B = _sum_by(members, nll), _sum_by(members, brier)
    S = np.where(usable, S, 1.0)
    copies = np.ones(len(S)) if origin is None else _sum_by(np.asarray(origin), np.ones(len(S)))
    of_nll, of_brier = 2 * (nll * B / S - brier) / S**2, -nll / S**2  # by the scores of any trajectory

    def variance(by_nll: NDArray[np.float64], by_brier: NDArray[np.float64]) -> NDArray[np.float64]:
        return (by_nll * nll_se) ** 2 + (by_brier * brier_se) ** 2 + 2 * by_nll * by_brier * both

    # Of c trajectories with the same tokens each adds its derivative to the one error that they have.
    sums = [_sum_by(members, copies * part) for part in (nll_se**2, brier_se**2, both)]
    of_all = of_nll**2 * sums[0] + of_brier**2 * sums[1] + 2 * of_nll * of_brier * sums[2]
    own = variance(copies * of_nll - B / S**2, copies * of_brier + 2 / S) - variance(copies * of_nll, copies * of_brier)
    return np.where(usable, np.sqrt(np.maximum(of_all + own, 0.0)), np.nan)


def measured_rate(nll_before: ArrayLike, nll_after: ArrayLike, steps: int) -> NDArray[np.float64]:
    """rho_measured = -log(nll_after / nll_before) / steps: how fast a trajectory was learnt, which rho stands in for.

    Args:
        nll_before: ``[N]`` mean nll of each trajectory at one state of the student.
        nll_after: ``[N]`` the same at a later one.
        steps: between the two.

    Returns:
        ``[N]``, a step; NaN where either nll is 0.
    """
    before, after = np.asarray(nll_before, dtype=np.float64), np.asarray(nll_after, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = -np.log(after / before) / steps
    return np.where((before > 0) & (after > 0), rate, np.nan)


def _sum_by(members: NDArray[Any], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each element's group sum."""
    return np.bincount(members, weights=values)[members] if len(values) else values
