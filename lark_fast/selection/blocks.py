"""Problems of one size side by side, so that arrays need no padding."""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def same_size(starts: Ints, sizes: Ints, n_cells: int) -> Iterator[tuple[Ints, Ints]]:
    """Problems of one size at a time: (problems ``[n]``, their cells ``[n, K]``), about ``n_cells`` of these at most.

    Args:
        starts: ``[N]`` the first cell of each problem; its others follow.
        sizes: ``[N]`` how many it has, at least 1.
        n_cells: what a block may hold; a larger problem is one of its own.
    """
    order = np.argsort(sizes, kind="stable")
    bounds = np.flatnonzero(np.diff(sizes[order], prepend=-1, append=-1))
    for first, stop in itertools.pairwise(bounds):
        size = int(sizes[order[first]])
        step = max(1, n_cells // size)
        for start in range(first, stop, step):
            problems = order[start : min(start + step, stop)]
            yield problems, starts[problems, None] + np.arange(size)
