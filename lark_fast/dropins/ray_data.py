"""Scores as columns of a Ray Data pipeline.

from lark_fast.dropins.ray_data import ScoreBatches, with_g_hat

scored = dataset.map_batches(ScoreBatches, fn_constructor_args=("/models/student",), concurrency=4, num_gpus=1,
                             batch_size=256)
ranked = scored.groupby("problem_id").map_groups(with_g_hat)

Each actor loads the student once. Ray Data restarts one that is lost and gives it its batches again. Where a run has to
be one that can be stopped, goes on, and writes what ``lark-fast select`` reads, there is ``lark-fast score --engine
ray``.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lark_fast.dropins.datasets_map import READ, ScoreRows
from lark_fast.scoring.finishing import first_with_same_tokens
from lark_fast.scoring.learnability import g_hat

if TYPE_CHECKING:
    from pandas import DataFrame

Columns = Mapping[str, NDArray[Any]]


class ScoreBatches(ScoreRows):
    """A class for ``dataset.map_batches`` that scores rows of any pool format, in batches of numpy or pandas.

    Columns added and arguments are those of ``ScoreRows``. Columns of Ray Data have one type in all of their blocks, so
    a row that was not scored (``rejected`` says why) has NaN for numbers, 0 for counts, False and "".

    The student's directory is a whole path that every node can read, or a hub's id: actors have a working directory of
    their own.
    """

    def __call__(self, batch: "Columns | DataFrame") -> "Columns | DataFrame":
        """The batch with the new columns; see ``ScoreRows``."""
        columns = {name: batch[name] for name in READ if name in batch} or {"": batch[next(iter(batch))]}
        made = super().__call__({name: list(values) for name, values in columns.items()})
        return _beside(batch, {name: _typed(name, values) for name, values in made.items()})


def with_g_hat(group: "Columns | DataFrame") -> "Columns | DataFrame":
    """Add g_hat (see ``lark_fast.g_hat``) to a problem's candidates, for ``map_groups``; NaN where there is no score.

    Args:
        group: all rows of one problem, with the columns of ``ScoreBatches``.
    """
    hashes, nll, brier = (
        np.asarray(group[name]) for name in ("token_hash", "nll", "brier_topk" if "brier_topk" in group else "brier")
    )
    scored = hashes != ""
    problem, tokens = np.zeros(len(hashes), dtype=np.int64), np.unique(hashes, return_inverse=True)[1]
    first = first_with_same_tokens(problem, tokens)  # those with the same tokens tie exactly
    values = np.full(len(hashes), np.nan)
    values[scored] = g_hat(nll[first][scored], brier[first][scored], problem[scored])
    return _beside(group, {"g_hat": values})


def _beside(batch: "Columns | DataFrame", made: Columns) -> "Columns | DataFrame":
    """A batch in its own format with more columns."""
    return batch.assign(**made) if hasattr(batch, "assign") else {**batch, **made}


def _typed(name: str, values: list[Any]) -> NDArray[Any]:
    if name in ("token_hash", "rejected", "problem_id"):
        return np.array(["" if value is None else str(value) for value in values], dtype=object)
    if name == "truncated":
        return np.array([bool(value) for value in values])
    if name in ("n_tokens", "n_input_tokens"):
        return np.array([value or 0 for value in values], dtype=np.int64)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
