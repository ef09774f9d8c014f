"""The largest numbers of many short columns at once, sorted, without sorting the columns.

A sort of a row of 33 numbers is a hundred branches that depend on them. Here a step is one maximum and one minimum over
rows of an array [K, R], which numpy computes several at a time: first every m rows are sorted among themselves, in all
groups at once; then two groups become one, again and again. Of two groups a and b that fall, the numbers
max(a_i, b_{m-1-i}) are the m largest, and such a run falls and rises at most once, which the steps of a bitonic merge
(Batcher, 1968) sort. Rows that are left over are inserted one by one.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

UP_TO = 8  # numbers wanted; beyond it a sort takes fewer steps
_TILE = 256


class Largest:
    """Finds the ``count`` largest numbers of each of R columns of K; the same arrays serve again and again.

    ``load`` them into ``columns`` ``[K, R]``, see that no NaN is there, and call it, which leaves something else there.
    """

    def __init__(self, k: int, r: int, count: int) -> None:
        self.shape = k, r
        self._count = count
        m = 1 << (count - 1).bit_length()
        n_groups = max(1, k // m)
        storage = np.empty((max(k, m), r))
        self.columns, self._filling = storage[:k], storage[k:]
        self._steps: list[tuple[np.ufunc, Floats, Floats, Floats]] = []
        grouped = storage[: n_groups * m].reshape(m, n_groups, r)  # number i of every group
        self._top = self._plan(grouped, np.empty_like(grouped), storage[n_groups * m : k])

    def load(self, rows: Floats) -> None:
        """Copy rows ``[R, K]`` into the columns."""
        for start in range(0, len(rows), _TILE):  # few enough to stay in the innermost cache between two columns
            self.columns[:, start : start + _TILE] = rows[start : start + _TILE].T

    def __call__(self) -> Floats:
        """``[count, R]``, falling; -inf where there are fewer numbers. Lasts until the next call."""
        self._filling[:] = -np.inf
        for operation, a, b, out in self._steps:
            operation(a, b, out=out)
        return self._top[: self._count]

    def _plan(self, numbers: Floats, spare: Floats, left_over: Floats) -> Floats:
        """Write down all steps, so that only they take time later; returns where the result will be."""
        m, width = len(numbers), 1
        while width < m:
            # Two sorted runs of ``width``, the second one turned round, are one that a merge sorts.
            a, b = _halves(numbers, width)
            self._exchange(a, b[:, ::-1], *_halves(spare, width))
            numbers, spare = self._merge(spare, numbers, width // 2)
            width *= 2
        while (n_groups := numbers.shape[1]) > 1:
            # With an odd number of groups the middle one stays, and its merge leaves it as it is.
            half = n_groups // 2
            kept = numbers[:, :half]
            self._steps.append((np.maximum, kept, numbers[::-1, n_groups - half :], kept))
            numbers, spare = self._merge(numbers[:, : n_groups - half], spare[:, : n_groups - half], m // 2)
        top, spare = numbers[:, 0], spare[:, 0]
        for row in left_over:
            self._steps.append((np.minimum, top[:-1], row, spare[1:]))  # what the insertion moves down
            self._steps.append((np.maximum, top[:1], row, top[:1]))
            self._steps.append((np.maximum, top[1:], spare[1:], top[1:]))
        return top

    def _merge(self, numbers: Floats, spare: Floats, step: int) -> tuple[Floats, Floats]:
        """Sort runs of 2 ``step`` numbers that fall and rise at most once: where they are then, and what is free."""
        while step:
            self._exchange(*_halves(numbers, step), *_halves(spare, step))
            numbers, spare, step = spare, numbers, step // 2
        return numbers, spare

    def _exchange(self, a: Floats, b: Floats, larger: Floats, smaller: Floats) -> None:
        self._steps += [(np.maximum, a, b, larger), (np.minimum, a, b, smaller)]


def _halves(numbers: Floats, step: int) -> Any:
    """First and second halves of the runs of 2 ``step``: views ``[m / (2 step), step, groups, R]``."""
    runs = numbers.reshape(len(numbers) // (2 * step), 2, step, *numbers.shape[1:])
    return runs[:, 0], runs[:, 1]
