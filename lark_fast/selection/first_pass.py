"""The first pass over the pool, where one is asked for: which records have to go, and which groups they belong to."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lark_fast.pool.reading import Pool
from lark_fast.scoring.learnability import g_hat
from lark_fast.selection.config import SelectConfig
from lark_fast.selection.constraints import NO_VALUE
from lark_fast.selection.filters import ColumnValues, Filter, Where
from lark_fast.selection.hygiene.removals import Removal
from lark_fast.selection.matching import Matching, RowIndex
from lark_fast.selection.scored_rows import ScoredRows


class Removed:
    """What filters took out: two bytes a row. Why a single one went is asked of its filter again.

    Args:
        filters: in the order in which they remove; what an earlier one takes is nothing to a later one.
        size: rows of the scores.
    """

    def __init__(self, filters: Sequence[Filter], size: int) -> None:
        self.counts: dict[str, int] = {}  # by the filter's name
        self.gone = np.zeros(size, dtype=bool)
        self._filters, self._by = filters, np.full(size, -1, dtype=np.int8)
        for place, a_filter in enumerate(filters):
            taken = np.zeros(size, dtype=bool)
            for removal in a_filter.removals(self.gone):
                taken[removal.row] = True
            self._by[taken] = place
            self.gone |= taken
            self.counts[a_filter.name] = int(np.count_nonzero(taken))

    def asked_in_order(self) -> Callable[[int], Removal | None]:
        """Why a row went, None for one that is left; to be asked of all rows, in the order of the pool."""
        again = [a_filter.removals(self._by_others(place)) for place, a_filter in enumerate(self._filters)]

        def reason(row: int) -> Removal | None:
            return next(again[self._by[row]]) if self.gone[row] else None

        return reason

    def _by_others(self, place: int) -> NDArray[np.bool_]:
        return (self._by >= 0) & (self._by < place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the pool's records have told before the selection."""

    removed: Removed
    groups: Mapping[str, tuple[NDArray[np.int32], list[str]]]  # each row's value and the values' names, by column
    notes: tuple[str, ...] = ()  # of the filters


def see_pool(
    config: SelectConfig,
    rows: ScoredRows,
    index: RowIndex | None,
    pool: Pool | None,
    columns: Sequence[str],
    brier: str,
    stack: ExitStack,
) -> Seen:
    """Read the pool once, where there is a reason to.

    What is removed loses its g_hat in ``rows``; then the other candidates get a new one.

    Args:
        config: names the filters.
        rows: with nll, g_hat and the Brier score, where there are filters.
        index: of the rows; None without a pool.
        pool: what was scored.
        columns: of the pool, whose values are asked for.
        brier: the column that g_hat is made of.
        stack: closes the filters.

    Raises:
        UserError: the pool is not the scored one; see the filters.
    """
    values = [ColumnValues(name, len(rows)) for name in columns]
    teacher = np.array([code if name else NO_VALUE for code, name in enumerate(rows.teachers)], dtype=np.int32)
    groups = {"teacher": (teacher[rows.teacher], rows.teachers)}
    if index is None or pool is None or not (values or config.filters):
        return Seen(removed=Removed((), len(rows)), groups=groups)
    filters = _filters(config, rows, stack)
    matching = Matching(index)
    for row, record in matching.pairs(pool, "reading"):
        for observer in (*values, *filters):
            observer.see(row, int(rows.problem[row]), record)
    matching.refuse_another_pool()
    removed = Removed(filters, len(rows))
    notes = tuple(note for a_filter in filters for note in a_filter.notes())
    if removed.gone.any():
        rows.numbers["g_hat"] = g_hat_of_the_rest(rows, removed.gone, brier)
    groups |= {column.column: column.groups() for column in values}
    return Seen(removed=removed, groups=groups, notes=notes)


def _filters(config: SelectConfig, rows: ScoredRows, stack: ExitStack) -> list[Filter]:
    """In the order in which they remove: what goes for one reason does not speak for another candidate."""
    filters: list[Filter] = [Where(condition, len(rows)) for condition in dict.fromkeys(config.where)]
    if config.decontaminate:
        from lark_fast.selection.hygiene.decontamination import DEFAULT_NGRAM, Decontamination

        filters.append(Decontamination(tuple(dict.fromkeys(config.decontaminate)), config.ngram or DEFAULT_NGRAM))
    if config.near_duplicates is not None:
        from lark_fast.selection.hygiene.duplicates import DEFAULT_THRESHOLD, ExactDuplicates, NearDuplicates

        preferred = -rows.numbers["g_hat"]
        if config.near_duplicates == "exact":
            filters.append(ExactDuplicates(len(rows), preferred))
        else:
            filters.append(NearDuplicates(len(rows), config.near_duplicate_threshold or DEFAULT_THRESHOLD, preferred))
    for a_filter in filters:
        stack.callback(a_filter.close)
    return filters


def g_hat_of_the_rest(rows: ScoredRows, gone: NDArray[np.bool_], brier: str) -> NDArray[np.float64]:
    """g_hat as if the removed candidates had never been: they were in their problem's sums.

    Args:
        rows: with nll, g_hat and the column ``brier``.
        gone: ``[R]``.
        brier: the Brier score that g_hat is made of.

    Returns:
        ``[R]``; NaN where a candidate is gone, or had none before.
    """
    numbers = rows.numbers
    renewed = g_hat(np.where(gone, np.nan, numbers["nll"]), numbers[brier], rows.problem)
    renewed[np.isnan(numbers["g_hat"])] = np.nan
    return renewed
