"""Sums over all trajectories, weighted or not."""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lark_fast.kernels.chi2 import effective_sample_size

if TYPE_CHECKING:
    from lark_fast.selection.scored_rows import ScoredRows


def effective_sizes(rows: "ScoredRows", weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each problem that has weight; under constraints a problem's weights may sum to less than 1."""
    sizes = []
    for block in rows.padded_blocks():
        q = np.where(block >= 0, weight[block], 0.0)
        q = q[q.sum(axis=1) > 0]
        sizes.append(effective_sample_size(q / q.sum(axis=1, keepdims=True)))
    return np.concatenate(sizes)


def weighted_mean(values: NDArray[np.number], weight: NDArray[np.float64]) -> float:
    """NaN where there is no weight."""
    return float(np.average(values, weights=weight)) if weight.sum() > 0 else math.nan


def weighted_median(values: NDArray[np.number], weight: NDArray[np.float64]) -> float:
    """The smallest value that has half of the weight at or below it; NaN where there is no weight."""
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(sums, sums[-1] / 2)]) if sums[-1] > 0 else math.nan
