"""The first pass over the pool, where one is asked for: which records have to go, and which groups they belong to."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lark_fast.pool.reading import Pool
from lark_fast.scoring.learnability import g_hat
from lark_fast.selection.config import SelectConfig
from lark_fast.selection.filters import NO_VALUE, ColumnValues, Filter, Where
from lark_fast.selection.hygiene.removals import Removal
from lark_fast.selection.matching import Matching, RowIndex
from lark_fast.selection.scored_rows import ScoredRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the pool's records have told before the selection."""

    counts: Mapping[str, int]  # how many each filter removed, by its name
    removed: Mapping[int, Removal]  # by row
    groups: Mapping[str, tuple[NDArray[np.int32], list[str]]]  # each row's value and the values' names, by column


def see_pool(
    config: SelectConfig,
    rows: ScoredRows,
    index: RowIndex | None,
    pool: Pool | None,
    columns: Sequence[str],
    brier: str,
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

    Raises:
        UserError: the pool is not the scored one; see the filters.
    """
    values = [ColumnValues(name, len(rows)) for name in columns]
    teacher = np.array([code if name else NO_VALUE for code, name in enumerate(rows.teachers)], dtype=np.int32)
    groups = {"teacher": (teacher[rows.teacher], rows.teachers)}
    if index is None or pool is None or not (values or config.filters):
        return Seen(counts={}, removed={}, groups=groups)
    with ExitStack() as stack:
        filters = _filters(config, rows, stack)
        matching = Matching(index)
        for row, record in matching.pairs(pool, "reading"):
            for observer in (*values, *filters):
                observer.see(row, int(rows.problem[row]), record)
        matching.refuse_another_pool()
        counts, removed = _remove(rows, filters)
    if removed:
        _renew_g_hat(rows, removed, brier)
    return Seen(counts=counts, removed=removed, groups=groups | {column.column: column.groups() for column in values})


def _filters(config: SelectConfig, rows: ScoredRows, stack: ExitStack) -> list[Filter]:
    """In the order in which they remove: what goes for one reason does not speak for another candidate."""
    filters: list[Filter] = [Where(condition, len(rows)) for condition in config.where]
    if config.decontaminate:
        from lark_fast.selection.hygiene.decontamination import Decontamination

        filters.append(Decontamination(config.decontaminate, ngram=config.ngram))
    if config.near_duplicates is not None:
        from lark_fast.selection.hygiene.duplicates import ExactDuplicates, NearDuplicates

        preferred = -rows.numbers["g_hat"]
        if config.near_duplicates == "exact":
            filters.append(ExactDuplicates(len(rows), preferred))
        else:
            filters.append(NearDuplicates(len(rows), config.near_duplicate_threshold, preferred))
    for a_filter in filters:
        stack.callback(a_filter.close)
    return filters


def _remove(rows: ScoredRows, filters: Sequence[Filter]) -> tuple[dict[str, int], dict[int, Removal]]:
    """How many each filter takes, and what, by row."""
    counts: dict[str, int] = {}
    removed: dict[int, Removal] = {}
    gone = np.zeros(len(rows), dtype=bool)
    for a_filter in filters:
        found = {removal.row: removal for removal in a_filter.removals(gone)}
        gone[list(found)] = True
        counts[a_filter.name] = len(found)
        removed |= found
    return counts, removed


def _renew_g_hat(rows: ScoredRows, removed: Iterable[int], brier: str) -> None:
    """g_hat of what is left, as if the removed candidates had never been: they were in their problem's sums."""
    numbers, gone = rows.numbers, list(removed)
    without = np.isnan(numbers["g_hat"])
    nll = numbers["nll"].copy()
    nll[gone] = np.nan
    numbers["g_hat"] = np.where(without, np.nan, g_hat(nll, numbers[brier], rows.problem))
