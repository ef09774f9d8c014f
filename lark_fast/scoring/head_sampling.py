"""Scores from a random part of a trajectory's scored positions, where the head costs more than the body.

The body reads all tokens; of the n scored positions only m meet the head. They are cut along the trajectory into
H = m / 2 strata, runs whose lengths N_h differ by at most one, and of each two positions are drawn without replacement,
every pair with the same probability. With w_h = N_h / n, and x_h1, x_h2 the values drawn in stratum h,

    mean  = sum_h w_h (x_h1 + x_h2) / 2                                         E[mean] = mean over all n positions
    cov   = sum_h w_h^2 (1 - 2 / N_h) (x_h1 - x_h2)(y_h1 - y_h2) / 4            E[cov] = Cov(mean of x, mean of y)

since in stratum h the half sum has the stratum's mean as its expectation, (x_h1 - x_h2)(y_h1 - y_h2) / 2 that of the
stratum's covariance s_h (divisor N_h - 1), two draws of N_h have a mean with covariance (1 - 2 / N_h) s_h / 2 (Cochran,
Sampling Techniques, 3rd ed., theorems 2.2 and 5.3), and draws of different strata are independent. So both are
unbiased, whatever the values are. A standard error is the root of such a variance, and a little low in the mean.

Against a simple random sample of m positions the variance is less by about the share of it that lies between strata:
tokens at a trajectory's start and end differ from those in its middle. What neighbours do not share stays.

Which positions are drawn is decided by the trajectory's token hash alone: the random numbers are the bytes that
SHAKE-128 makes of it, which are the same in every version of everything. So neither batch, order, device nor resumption
changes them, and trajectories with the same tokens tie exactly.
"""

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lark_fast.batch import Targets
from lark_fast.kernels.trajectory_reduce import MAX_RANK, SMALLEST_NLL

if TYPE_CHECKING:
    from lark_fast.kernels.token_stats import TokenStats

LEAST = 32  # positions of a trajectory that are drawn however small the share is
SEED = b"lark-fast head sampling"


def n_drawn(n: int, share: float) -> int:
    """How many of n scored positions meet the head: the share of them, LEAST at least, an even number; or all."""
    asked = max(LEAST, math.ceil(share * n))
    return min(n, asked + asked % 2)


def sample_rows(n: int, share: float, digest: bytes) -> NDArray[np.int64]:
    """Positions that meet the head.

    Args:
        n: scored positions of a trajectory.
        share: of them, between 0 and 1.
        digest: 16 bytes, its token hash.

    Returns:
        ``[n_drawn(n, share)]`` of 0, ..., n - 1, rising: two of each stratum, one stratum behind another.
    """
    m = n_drawn(n, share)
    if m == n:
        return np.arange(n)
    sizes = _stratum_sizes(n, m)
    words = np.frombuffer(hashlib.shake_128(SEED + digest).digest(8 * m), dtype="<u8").reshape(-1, 2)
    first = words[:, 0] % sizes.astype(np.uint64)  # off even chances by N_h / 2^64
    second = words[:, 1] % (sizes - 1).astype(np.uint64)
    second += second >= first
    pairs = np.sort(np.stack([first, second], axis=1).astype(np.int64), axis=1)  # [H, 2]
    return (pairs + (np.cumsum(sizes) - sizes)[:, None]).reshape(-1)


def estimate(values: ArrayLike, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means over all n positions, from those drawn, and how sure they are.

    Args:
        values: ``[F, m]``, F statistics at the positions of ``sample_rows``, in its order.
        n: scored positions of the trajectory.

    Returns:
        ``[F]`` means and ``[F, F]`` covariances of these; the roots of its diagonal are their standard errors. 0 where
        all positions were drawn. Means are NaN where there is no position.
    """
    values = np.asarray(values, dtype=np.float64)
    n_statistics, m = values.shape
    if m == n:
        means = values.mean(axis=1) if n else np.full(n_statistics, np.nan)
        return means, np.zeros((n_statistics, n_statistics))
    sizes = _stratum_sizes(n, m)
    weights = sizes / n
    pairs = values.reshape(n_statistics, -1, 2)  # [F, H, 2]
    means = (pairs.sum(axis=2) / 2) @ weights
    apart = (pairs[:, :, 0] - pairs[:, :, 1]) * (weights * np.sqrt(1 - 2 / sizes) / 2)
    return means, apart @ apart.T


def draw(labels: ArrayLike, digest: bytes, share: float) -> Targets:
    """What a pass is asked about a trajectory.

    Args:
        labels: ``[T]``, NOT_SCORED where not scored.
        digest: its token hash.
        share: of the scored positions.
    """
    every = Targets.of(labels)
    n = len(every.rows)
    chosen = sample_rows(n, share, digest)
    return Targets(every.rows[chosen], every.words[chosen], n)


def sampled_means(tokens: "TokenStats", n: int) -> dict[str, float | None]:
    """What ``Scored.means`` has of a trajectory: estimates, with standard errors where rho and g_hat are made of them.

    Args:
        tokens: statistics of the positions that ``draw`` has chosen, all of them, on the CPU.
        n: scored positions of the trajectory.
    """
    columns = {
        "nll": tokens.nll,
        "brier": tokens.brier,
        "brier_topk": tokens.brier_topk,
        "entropy": tokens.entropy,
        "rank_mean": tokens.rank.clamp(max=MAX_RANK),
    }
    given = [name for name, values in columns.items() if values is not None]
    means, covariance = estimate(np.stack([columns[name].double().numpy() for name in given]), n)
    made = dict.fromkeys(columns) | dict(zip(given, means.tolist(), strict=True))
    errors = dict(zip(given, np.sqrt(covariance.diagonal()).tolist(), strict=True))
    used = given.index("brier" if tokens.brier_topk is None else "brier_topk")
    return made | {
        "rsr": n * made["rank_mean"] / max(n * made["nll"], SMALLEST_NLL) if n else math.nan,
        "nll_se": errors["nll"],
        "brier_se": errors["brier"],
        "brier_topk_se": errors.get("brier_topk"),
        "nll_brier_cov": float(covariance[0, used]),
    }


def _stratum_sizes(n: int, m: int) -> NDArray[np.int64]:
    """``[m / 2]`` positions of each stratum, at least two."""
    strata = m // 2
    return np.diff(np.arange(strata + 1) * n // strata)
