"""What training minimises. With T_i the scored tokens of trajectory i and nll_it the nll of its t-th:

    L = sum_i w_i nll_i / sum_i w_i,   nll_i = (1 / T_i) sum_t nll_it

    step on a global batch of n trajectories, loss_norm="trajectory":   sum_i w_i nll_i / (n mean_i(w_i))
                                              loss_norm="token":        sum_i w_i sum_t nll_it / (n mean_i(w_i T_i))

The means run over the whole training set, so the divisor is known before the step and is the same for every
micro-batch: the step does not depend on how its batch is cut. A divisor taken from the micro-batch itself would cancel
the weights, all of them where a micro-batch holds one trajectory.
"""

import math
from typing import Literal

import numpy as np

LossNorm = Literal["trajectory", "token"]


def mean_weight(weights: np.ndarray, n_scored: np.ndarray, loss_norm: LossNorm) -> float:
    """Mean of w_i, or of w_i T_i, over a training set of weights ``[N]`` and scored tokens ``[N]``."""
    return float(np.mean(weights if loss_norm == "trajectory" else weights * n_scored))


def token_weights(
    weights: np.ndarray, n_scored: np.ndarray, *, batch_size: int, mean: float, loss_norm: LossNorm
) -> np.ndarray:
    """The factor of every scored token's nll in the step's objective.

    Args:
        weights: ``[m]`` weights of some trajectories of a global batch: all of them, or a micro-batch.
        n_scored: ``[m]`` their scored tokens.
        batch_size: n, the trajectories of the global batch.
        mean: ``mean_weight`` of the whole training set.
        loss_norm: "trajectory" or "token".

    Returns:
        ``[m]`` float64; the tokens of one trajectory share a factor.
    """
    share = weights / n_scored if loss_norm == "trajectory" else weights
    return share / (batch_size * mean)


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Rate of step 0, 1, ..., total - 1: linear up to ``peak`` over the first share of steps, then half a cosine to 0.

    The first step moves (its rate is peak / warm-up steps) and so does the last.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
