"""Transformers' ``Trainer`` with a weight for every trajectory."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer

from lark_fast.trainers.collator import pad_right
from lark_fast.trainers.mixin import WeightedLoss
from lark_fast.trainers.weighting import FACTORS, weighted_rows, with_factors
from lark_fast.training.objective import LossNorm


class WeightedTrainer(WeightedLoss, Trainer):
    """``transformers.Trainer`` for causal language models, on rows of ``input_ids``, ``labels`` and ``weight``.

    Rows of weight 0 are left out. Evaluation sets may do without weights. See ``WeightedLoss`` for what is minimised.

    Args:
        *args: as ``Trainer``.
        train_dataset: a tokenised ``datasets.Dataset``.
        eval_dataset: the same, or a dict of them.
        data_collator: one that keeps all tokens in order and masks no label; rows are padded on the right without one.
        loss_norm: "trajectory": every trajectory's mean nll counts; "token": its sum does.
        padding_free: lay a micro-batch's trajectories one behind another in one row, without padding.
        **kwargs: as ``Trainer``.

    Raises:
        TypeError: a streaming dataset.
        ValueError: a column that is missing, a bad weight (by row), another loss asked for, or a model whose attention
            does not keep trajectories of a row apart.
    """

    def __init__(
        self,
        *args: Any,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        loss_norm: LossNorm = "trajectory",
        padding_free: bool = False,
        **kwargs: Any,
    ) -> None:
        self.loss_norm, self.padding_free = loss_norm, padding_free
        if padding_free and data_collator is not None:
            raise ValueError("padding_free brings its own data_collator")
        flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True) if padding_free else pad_right
        super().__init__(
            *args,
            train_dataset=None if train_dataset is None else self._weigh(train_dataset, "train"),
            eval_dataset=self._weigh_all(eval_dataset),
            data_collator=data_collator or flatten,
            **kwargs,
        )
        self._start_weighing()

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ``Trainer.evaluate``; a dataset may be given as the constructor takes it."""
        return super().evaluate(self._weigh_all(eval_dataset), *args, **kwargs)

    def _weigh_all(self, datasets: Any) -> Any:
        if isinstance(datasets, dict):
            return {name: self._weigh(dataset, name, required=False) for name, dataset in datasets.items()}
        return (
            datasets if datasets is None or isinstance(datasets, str) else self._weigh(datasets, "eval", required=False)
        )

    def _weigh(self, dataset: Dataset, name: str, *, required: bool = True) -> Dataset:
        if isinstance(dataset, Dataset) and FACTORS in dataset.column_names:
            return dataset
        return with_factors(weighted_rows(dataset, name, required=required), name, self.loss_norm)
