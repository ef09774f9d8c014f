"""How alike two orders are."""

import numpy as np
from numpy.typing import NDArray


def rank_correlation(one: NDArray[np.number], other: NDArray[np.number]) -> float:
    """Spearman's: ties share their rank; 0 where one of the two is constant."""
    ranks = []
    for values in (one, other):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])
