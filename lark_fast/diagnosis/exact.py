"""What rho and g_hat stand for, computed from gradients (LARK, arXiv 2605.30651; derived in docs/method.md).

Let G_ij = <grad nll_i, grad nll_j> be the Gram matrix of a problem's K trajectories, l their nll, and q weights that
sum to 1. For gradient flow on L_q = sum_k q_k l_k,

    R(q)     = |grad L_q|^2 / L_q = q'Gq / q'l                          relative rate of decay, in nats
    dR/dq_k  = 2 (Gq)_k / q'l  -  l_k q'Gq / (q'l)^2.

With G diagonal and G_kk = kappa * brier_k, dR/dq_k at uniform q is kappa * g_hat_k (``scoring.learnability``).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def relative_rate(gram: ArrayLike, nll: ArrayLike, q: ArrayLike) -> float:
    """R(q), the rate at which gradient flow on the q-weighted loss makes that loss decay.

    Args:
        gram: ``[K, K]`` inner products of the trajectories' gradients.
        nll: ``[K]`` nats.
        q: ``[K]``.

    Returns:
        Per unit of time (of step size times steps); NaN where the loss is 0.
    """
    gram, nll, q = (np.asarray(values, dtype=np.float64) for values in (gram, nll, q))
    loss = q @ nll
    return float(q @ gram @ q / loss) if loss > 0 else float("nan")


def rate_gradient(gram: ArrayLike, nll: ArrayLike, q: ArrayLike) -> NDArray[np.float64]:
    """dR/dq, ``[K]``: what ``kappa * g_hat`` estimates at uniform q; arguments as ``relative_rate``."""
    gram, nll, q = (np.asarray(values, dtype=np.float64) for values in (gram, nll, q))
    loss = q @ nll
    if loss <= 0:
        return np.full(len(nll), np.nan)
    return 2 * (gram @ q) / loss - nll * (q @ gram @ q) / loss**2


def cross_share(gram: ArrayLike, q: ArrayLike) -> float:
    """1 - sum_k q_k^2 G_kk / q'Gq: the part of |grad L_q|^2 that orthogonal gradients would not have; NaN for 0 / 0."""
    gram, q = np.asarray(gram, dtype=np.float64), np.asarray(q, dtype=np.float64)
    whole = q @ gram @ q
    return float(1 - q**2 @ np.diag(gram) / whole) if whole > 0 else float("nan")


def cosines(gram: ArrayLike) -> NDArray[np.float64]:
    """``[K (K - 1) / 2]`` cosines of the angles between the gradients of each pair; NaN where one is 0."""
    gram = np.asarray(gram, dtype=np.float64)
    norms = np.sqrt(np.diag(gram))
    above = np.triu_indices(len(gram), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (gram / np.outer(norms, norms))[above]
