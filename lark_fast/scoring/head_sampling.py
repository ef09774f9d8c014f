"""Scores from a random part of a trajectory's scored positions, where the head costs more than the body.

The body reads all tokens; of the n scored positions only m meet the head. They are cut along the trajectory into H
runs, the strata: N_h positions of which d_h are drawn without replacement, every such set with the same chance. With
w_h = N_h / n, and bars for means and s_h for the covariance (divisor d_h - 1) of the d_h values drawn,

    mean of x  = sum_h w_h xbar_h                                E = mean over all n positions
    covariance = sum_h w_h^2 (1 - d_h / N_h) s_h(x, y) / d_h     E = Cov(mean of x, mean of y)

since xbar_h has the stratum's mean as its expectation and s_h the stratum's covariance (divisor N_h - 1), d_h draws of
N_h have means of covariance (1 - d_h / N_h) s_h / d_h (Cochran, Sampling Techniques, 3rd ed., theorems 2.2 and 5.3),
and draws of different strata are independent. So both are unbiased, whatever the values are. A standard error is the
root of such a variance, and a little low in the mean.

Against a simple random sample of m positions the variance is less by the share of it that lies between strata: tokens
at a trajectory's start and end differ from those in its middle. The more strata the better, but each needs two draws to
know its error; and where most positions are drawn, two that are not, or most strata would be read whole and the error
known from the few others. So H = min(m, n - m) / 2, draws and others dealt out evenly.

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
    """How many of n scored positions meet the head: the share of them, LEAST at least; or all."""
    return min(n, max(LEAST, math.ceil(share * n)))


def sample_rows(n: int, share: float, digest: bytes) -> NDArray[np.int64]:
    """Positions that meet the head.

    Args:
        n: scored positions of a trajectory.
        share: of them, between 0 and 1.
        digest: 16 bytes, its token hash.

    Returns:
        ``[n_drawn(n, share)]`` of 0, ..., n - 1, rising: those of a stratum one behind another.
    """
    m = n_drawn(n, share)
    if m == n:
        return np.arange(n)
    sizes, draws = strata(n, m)
    chances = np.frombuffer(hashlib.shake_128(SEED + digest).digest(8 * n), dtype="<u8")
    order = np.lexsort((chances, np.repeat(np.arange(len(sizes)), sizes)))  # each stratum shuffled by itself
    place = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[place < np.repeat(draws, sizes)])


def strata(n: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many positions each stratum has, and how many of them are drawn: ``[H]`` each, where m < n are drawn."""
    steps = np.arange(max(1, min(m, n - m) // 2) + 1)
    draws, others = (np.diff(steps * number // steps[-1]) for number in (m, n - m))
    return draws + others, draws


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
    sizes, draws = strata(n, m)
    means = np.add.reduceat(values, np.cumsum(draws) - draws, axis=1) / draws  # [F, H]
    scale = sizes / n * np.sqrt((1 - draws / sizes) / (draws * (draws - 1)))
    apart = (values - np.repeat(means, draws, axis=1)) * np.repeat(scale, draws)
    return means @ (sizes / n), apart @ apart.T


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
