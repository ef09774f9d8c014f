"""What goes into the selection weights, checked and laid out: problems padded or one behind another, as blocks."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DEFAULT_BUDGET = 3
TIES = ("exact", "reference")

_LARGEST_BUDGET = 2**31  # no problem has as many candidates

# Problems that lie one behind another share a block with those of at most this many times their size.
_PADDED_UP_TO = 1.25


@dataclass(slots=True, kw_only=True)
class Block:
    """Some problems, padded with NaN to one size."""

    names: "Names"
    rows: slice | Ints  # which problems, [R]
    energies: Floats  # [R, K], NaN also where the prior is 0
    prior: Floats | None  # [R, K], 0 where there is no valid candidate
    budget: int | Ints  # one for all or [R]
    tau: float | Floats | None  # one for all or [R]; None: the budget form
    ties: str
    cells: tuple[Ints, NDArray[np.bool_]] | None  # where [R, K] lies in the flat arrays, and which of it does
    full: bool | None = None  # whether no energy is NaN; None: nobody has looked
    least: float = -np.inf  # no energy is below it; known where the block is full

    def look(self) -> bool:
        """Find out whether the block is ``full``.

        Raises:
            ValueError: an infinite energy (ties="exact").
        """
        e = self.energies
        # NaN shows in both, and they take a fifth of the time that looking for it does.
        least, most = float(e.min()), float(e.max())
        self.full = bool(np.isfinite(least) and np.isfinite(most))
        if self.full:
            self.least = least
        else:
            self.full = not np.isnan(e).any()
            if self.ties == "exact":
                self.reject(np.isinf(e), "energies", e, "must be finite or NaN")
        return self.full

    def use_prior(self, prior: Floats) -> None:
        """Take a prior ``[R, K]`` or ``[K]``; a prior of 0 takes its candidate out.

        Raises:
            ValueError: an infinite energy, or an unusable prior.
        """
        self.look()
        valid = ~np.isnan(self.energies)
        self.prior = prior = np.where(valid, prior, 0.0)
        self.reject(~(np.isfinite(prior) & (prior >= 0)), "prior", prior, "priors must be finite and not negative")
        empty = valid.any(axis=1) & ~prior.any(axis=1)
        if empty.any():
            name = self.names.problem(self.rows, np.flatnonzero(empty)[0])
            raise ValueError(f"prior: {name}0 for every valid candidate; at least one must be above 0")
        if not prior.all():
            self.energies, self.full = np.where(prior > 0, self.energies, np.nan), False
            self.least = -np.inf

    def reject(self, wrong: NDArray[np.bool_], name: str, values: Floats, rule: str) -> None:
        """Raises ValueError naming the first ``wrong`` one of ``values`` ``[R, K]``, if there is any."""
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            place = self.names.candidate(self.rows, row, column)
            raise ValueError(f"{name}: {place} is {values[row, column]}; {rule}")


class Names(NamedTuple):
    """What errors call a problem and a candidate, by how the energies came: ``[K]``, padded or flat."""

    single: bool
    flat: bool

    def problem(self, rows: slice | Ints, row: int) -> str:
        """With a colon behind it; empty where there is only one."""
        return "" if self.single else f"{self._problem(rows, row)}: "

    def candidate(self, rows: slice | Ints, row: int, column: int) -> str:
        """A candidate and its problem."""
        if self.single:
            return f"candidate {column}"
        return f"{self._problem(rows, row)}, candidate {'' if self.flat else '(column) '}{column}"

    def _problem(self, rows: slice | Ints, row: int) -> str:
        number = rows.start + row if isinstance(rows, slice) else rows[row]
        return f"problem {'' if self.flat else '(row) '}{number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """N checked problems; energies and prior are checked as ``blocks`` come to them."""

    energies: Floats  # [N, K], NaN where there is no candidate, or flat [M]
    offsets: Ints | None  # [N + 1] into the flat arrays
    prior: Floats | None  # as the energies, or [K]
    budget: int | Ints  # one for all or [N]
    tau: float | Floats | None  # one for all or [N]; None: the budget form
    ties: str
    single: bool  # came as [K], without a name for its one problem

    @property
    def n(self) -> int:
        """How many problems."""
        return len(self.energies) if self.offsets is None else len(self.offsets) - 1

    def blocks(self, n_cells: int) -> Iterator[Block]:
        """All problems that have room for a candidate, in blocks of about ``n_cells`` cells.

        Raises:
            ValueError: an unusable prior, and with one an infinite energy; without one ``Block.look`` tells of those.
        """
        if self.offsets is not None:
            for rows, width in _rows_by_size(np.diff(self.offsets), n_cells):
                cells = self.offsets[rows, None] + np.arange(width)
                here = cells < self.offsets[rows + 1, None]
                cells = np.where(here, cells, 0)
                e = self.energies[cells]
                if not here.all():
                    e[~here] = np.nan
                yield self._block(rows, e, None if self.prior is None else self.prior[cells], (cells, here))
        elif self.energies.size:
            height = max(1, n_cells // self.energies.shape[1])
            for start in range(0, self.n, height):
                rows = slice(start, start + height)
                prior = self.prior[rows] if self.prior is not None and self.prior.ndim == 2 else self.prior
                yield self._block(rows, self.energies[rows], prior, None)

    def _block(self, rows: slice | Ints, energies: Floats, prior: Floats | None, cells: Any) -> Block:
        block = Block(
            names=Names(self.single, self.offsets is not None),
            rows=rows,
            energies=energies,
            prior=None,
            budget=self.budget if np.ndim(self.budget) == 0 else self.budget[rows],
            tau=self.tau if np.ndim(self.tau) == 0 else self.tau[rows],
            ties=self.ties,
            cells=cells,
        )
        if prior is not None:
            block.use_prior(prior)
        return block


def as_problems(
    energies: ArrayLike, budget: Any, prior: ArrayLike | None, tau: Any, ties: str, offsets: ArrayLike | None
) -> Problems:
    """The arguments of ``chi2_solve``, checked but for the values of energies and prior.

    Raises:
        ValueError: as ``chi2_solve``.
    """
    array = np.asarray(energies, dtype=np.float64)
    shape = array.shape
    check_choices(shape, budget, prior, tau, ties, offsets is not None)
    if offsets is not None:
        offsets = np.asarray(offsets)
        check_offsets_shape(offsets.shape, np.issubdtype(offsets.dtype, np.integer))
        offsets = offsets.astype(np.int64)
        falls = bool((np.diff(offsets) < 0).any())
        check_offsets(int(offsets[0]), int(offsets[-1]), falls, shape[0])
    single = offsets is None and array.ndim == 1
    if prior is not None:
        prior = np.asarray(prior, dtype=np.float64)
        check_prior_shape(prior.shape, shape)
        prior = np.atleast_2d(prior) if single else prior
    array = np.atleast_2d(array) if single else array
    n = len(array) if offsets is None else len(offsets) - 1
    return Problems(
        energies=array,
        offsets=offsets,
        prior=prior,
        budget=as_budgets(budget, n) if tau is None else 0,
        tau=None if tau is None else as_taus(tau, n),
        ties=ties,
        single=single,
    )


def check_choices(shape: tuple[int, ...], budget: Any, prior: Any, tau: Any, ties: str, ragged: bool) -> None:
    """Raises ValueError where the arguments do not go together, whatever their values."""
    if ragged and len(shape) != 1:
        raise ValueError(f"energies with offsets must have the axis (M,); got {len(shape)} axes, shape {shape}")
    if len(shape) not in (1, 2):
        raise ValueError(f"energies must have the axes (K,) or (N, K); got {len(shape)} axes, shape {shape}")
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}; got {ties!r}")
    if budget is not None and tau is not None:
        raise ValueError("give budget or tau, not both: the budget form sets tau itself")
    if ties == "reference" and (prior is not None or tau is not None):
        name = "prior" if prior is not None else "tau form"
        raise ValueError(f"ties='reference' has no {name}: the released code knows a budget and uniform priors only")


def check_prior_shape(shape: tuple[int, ...], energies: tuple[int, ...]) -> None:
    """Raises ValueError unless a prior fits energies of that shape."""
    if shape not in (energies, energies[-1:]):
        allowed = " or ".join(str(s) for s in dict.fromkeys((energies, energies[-1:])))
        raise ValueError(f"prior must have the shape {allowed} of the energies; got {shape}")


def check_offsets_shape(shape: tuple[int, ...], whole: bool) -> None:
    """Raises ValueError unless offsets are ``[N + 1]`` whole numbers."""
    if len(shape) != 1 or shape[0] == 0 or not whole:
        what = "whole numbers" if whole else "numbers that are not whole"
        raise ValueError(f"offsets must be N + 1 whole numbers, at least one; got {what} of shape {shape}")


def check_offsets(first: int, last: int, falls: bool, n_energies: int) -> None:
    """Raises ValueError unless offsets rise from 0 to the number of energies."""
    if first != 0 or last != n_energies or falls:
        detail = ", falling on the way" if falls else ""
        raise ValueError(f"offsets must rise from 0 to M = {n_energies}; these go from {first} to {last}{detail}")


def check_setting_shape(name: str, shape: tuple[int, ...], n: int) -> None:
    """Raises ValueError unless a budget or tau is one number or ``[N]``."""
    if shape not in ((), (n,)):
        raise ValueError(f"{name} must be one number or one a problem, ({n},); got the shape {shape}")


def as_budgets(budget: Any, n: int) -> int | Ints:
    """Budgets of n problems, checked: one for all or ``[N]``; None is the default."""
    if budget is None:
        return DEFAULT_BUDGET
    if np.ndim(budget) == 0:
        try:
            count = operator.index(budget)
        except TypeError:
            raise ValueError(f"budget must be a whole number; got {budget!r}") from None
        if count < 1:
            raise ValueError(f"budget must be at least 1; got {count}")
        return min(count, _LARGEST_BUDGET)
    array = np.asarray(budget)
    check_setting_shape("budget", array.shape, n)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"budget must be a whole number for every problem; got {array.dtype}")
    low = np.flatnonzero(array < 1)
    if len(low):
        raise ValueError(f"budget must be at least 1; got {array[low[0]]} for problem {low[0]}")
    return np.minimum(array, _LARGEST_BUDGET).astype(np.int64)


def as_taus(tau: Any, n: int) -> float | Floats:
    """taus of n problems, checked: one for all or ``[N]``."""
    if np.ndim(tau) == 0:
        try:
            value = float(tau)
        except TypeError:
            raise ValueError(f"tau must be a number; got {tau!r}") from None
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"tau must be a finite number above 0; got {tau!r}")
        return value
    array = np.asarray(tau, dtype=np.float64)
    check_setting_shape("tau", array.shape, n)
    wrong = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if len(wrong):
        raise ValueError(f"tau must be a finite number above 0; got {array[wrong[0]]} for problem {wrong[0]}")
    return array


def _rows_by_size(sizes: Ints, n_cells: int) -> Iterator[tuple[Ints, int]]:
    """Problems of about one size together, and the size of the largest of them; empty ones left out."""
    order = np.argsort(sizes, kind="stable")
    rising = sizes[order]
    start = int(np.searchsorted(rising, 0, side="right"))
    while start < len(order):
        alike = int(np.searchsorted(rising, _PADDED_UP_TO * rising[start], side="right"))
        stop = min(alike, start + max(1, n_cells // int(rising[start])))
        yield order[start:stop], int(rising[stop - 1])
        start = stop
