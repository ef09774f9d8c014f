"""A tokenised dataset with a ``weight`` per row -> a factor for every token.

The factor of trajectory i's scored tokens is w_i / (T_i w_mean), or w_i / mean(w_i T_i) for loss_norm="token": see
``training/objective.py``. Over a global batch of n trajectories, sum_t factor_t nll_t / n is the objective, however the
tokens are laid out. So the factors go through packing and padding-free collators as one more column beside the labels,
and nothing else has to be kept of where a trajectory begins and ends. All that is not scored has factor 0.
"""

import warnings
from typing import Any

import numpy as np
from datasets import Dataset

from lark_fast.errors import RejectError
from lark_fast.training.objective import LossNorm, mean_weight, token_weights
from lark_fast.weights import checked_weight

NOT_SCORED = -100
FACTORS = "token_weights"


def weighted_rows(dataset: Dataset, name: str, *, required: bool = True) -> Dataset:
    """The rows of a dataset that have a weight above 0.

    Args:
        dataset: with a column ``weight``.
        name: what messages call it.
        required: without the column, fail; otherwise every row weighs 1.

    Raises:
        TypeError: a dataset without a length, whose mean weight nobody knows.
        ValueError: no column ``weight``; a weight that is none, by row; no row left.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"the {name} dataset is a {type(dataset).__name__}, not a datasets.Dataset: the mean weight has to be "
            "known before the first step"
        )
    if "weight" not in dataset.column_names:
        if required:
            raise ValueError(
                f"the {name} dataset has no column 'weight' (but {', '.join(dataset.column_names)}); lark-fast select "
                "writes one, and equal weights are a column of ones"
            )
        return dataset.add_column("weight", np.ones(len(dataset)))
    weights = np.empty(len(dataset))
    for row, value in enumerate(dataset.with_format(None)["weight"]):
        try:
            weights[row] = checked_weight(value)
        except RejectError as error:
            raise ValueError(f"row {row} of the {name} dataset: {error}") from None
    rows = np.flatnonzero(weights)
    if not len(rows):
        raise ValueError(f"the {name} dataset has no row of weight above 0")
    return dataset if len(rows) == len(dataset) else dataset.select(rows)


def with_factors(dataset: Dataset, name: str, loss_norm: LossNorm) -> Dataset:
    """Rows as they will be trained on, with the factors of their tokens; rows without a scored token are left out.

    Args:
        dataset: ``input_ids``, ``labels`` (-100 is not scored; the first token never is) and ``weight`` > 0, truncated.
        name: what messages call it.
        loss_norm: "trajectory" or "token".

    Returns:
        ``input_ids``, ``labels``, ``token_weights``: lists of one length in each row.

    Raises:
        ValueError: a column that is missing, a padded row, no scored token at all.
    """
    missing = {"input_ids", "labels"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"the {name} dataset has no column {' and no '.join(sorted(missing))}: tokenise it first")
    if loss_norm not in ("trajectory", "token"):
        raise ValueError(f"loss_norm={loss_norm!r}: one of 'trajectory', 'token'")
    columns = ["input_ids", "labels", "weight"]
    padded = "attention_mask" in dataset.column_names
    dataset = dataset.with_format("numpy").select_columns([*columns, "attention_mask"] if padded else columns)
    n_scored = np.empty(len(dataset), dtype=np.int64)
    for first in range(0, len(dataset), 1000):
        part = dataset[first : first + 1000]
        n_scored[first : first + 1000] = [np.count_nonzero(_scored(labels)) for labels in part["labels"]]
        if padded and not all(mask.all() for mask in part["attention_mask"]):
            raise ValueError(f"the {name} dataset holds padded rows: tokenise it without padding")
    kept = np.flatnonzero(n_scored)
    if not len(kept):
        raise ValueError(f"the {name} dataset has no scored token")
    if len(kept) < len(dataset):
        warnings.warn(
            f"{len(dataset) - len(kept)} rows of the {name} dataset have no scored token and are left out", stacklevel=2
        )
        dataset, n_scored = dataset.select(kept), n_scored[kept]
    weights = np.array(dataset["weight"], dtype=np.float64)
    mean = mean_weight(weights, n_scored, loss_norm)
    factors = token_weights(weights, n_scored, batch_size=1, mean=mean, loss_norm=loss_norm)

    def spread(rows: dict[str, Any], indices: list[int]) -> dict[str, list[np.ndarray]]:
        return {
            FACTORS: [
                np.where(_scored(labels), factors[index], 0.0).astype(np.float32)
                for labels, index in zip(rows["labels"], indices, strict=True)
            ]
        }

    leave = [column for column in dataset.column_names if column not in ("input_ids", "labels")]
    weighed = f"Weighing the tokens of the {name} dataset"
    dataset = dataset.map(spread, batched=True, with_indices=True, remove_columns=leave, desc=weighed)
    return dataset.with_format(None)


def _scored(labels: np.ndarray) -> np.ndarray:
    """``[T]`` bool; nothing predicts the first token."""
    scored = labels != NOT_SCORED
    scored[:1] = False
    return scored
