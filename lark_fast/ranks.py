"""How alike two orders are."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def rank_correlation(one: NDArray[np.number], other: NDArray[np.number]) -> float:
    """Spearman's: ties share their rank; 0 where one of the two is constant."""
    ranks = []
    for values in (one, other):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def rank_correlations(one: NDArray[np.number], other: NDArray[np.number], groups: ArrayLike) -> NDArray[np.float64]:
    """Spearman's within each group that has one: two rows at least, and neither the same in all of them.

    Args:
        one, other: ``[R]``, finite.
        groups: ``[R]`` each row's, numbers or strings.

    Returns:
        ``[G]``, in the order of the groups' names.
    """
    members = np.unique(np.asarray(groups), return_inverse=True)[1]
    order, ends = np.argsort(members, kind="stable"), np.cumsum(np.bincount(members))
    found = [
        rank_correlation(one[rows], other[rows])
        for rows in np.split(order, ends[:-1])
        if len(rows) > 1 and np.ptp(one[rows]) > 0 and np.ptp(other[rows]) > 0
    ]
    return np.array(found, dtype=np.float64)
