"""TRL's ``SFTTrainer`` with a weight for every trajectory."""

from copy import copy
from typing import Any

import torch
from datasets import Dataset
from trl import SFTTrainer
from trl.data_utils import pack_dataset

from lark_fast.trainers.mixin import WeightedLoss
from lark_fast.trainers.weighting import FACTORS, weighted_rows, with_factors
from lark_fast.training.objective import LossNorm


class WeightedSFTTrainer(WeightedLoss, SFTTrainer):
    """``trl.SFTTrainer`` on rows with a ``weight``: any row it takes, padded, ``padding_free`` or packed.

    Rows of weight 0 are left out. Evaluation sets may do without weights. A step counts trajectories, not packs. See
    ``WeightedLoss`` for what is minimised. Which tokens are scored is TRL's to say: ``assistant_only_loss``,
    ``completion_only_loss``, or a column ``labels``. Entropy and token accuracy are logged in evaluation alone.

    Args:
        *args: as ``SFTTrainer``.
        loss_norm: "trajectory": every trajectory's mean nll counts; "token": its sum does.
        **kwargs: as ``SFTTrainer``.

    Raises:
        TypeError: a streaming dataset.
        ValueError: no column ``weight``, a bad weight (by row), a packing that cuts trajectories, another loss asked
            for, or a model whose attention does not keep trajectories of a row apart.
    """

    def __init__(self, *args: Any, loss_norm: LossNorm = "trajectory", **kwargs: Any) -> None:
        self.loss_norm = loss_norm
        self._trained_on_is_next = True
        super().__init__(*args, **kwargs)
        if FACTORS not in self.train_dataset.column_names:
            raise ValueError("skip_prepare_dataset leaves the weights out; rows with input_ids are not tokenised again")
        self._start_weighing()

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Dataset:
        """As TRL, and the factors of the tokens: known once rows are truncated, and packed like ids and labels."""
        required, self._trained_on_is_next = self._trained_on_is_next, False  # TRL prepares that one first
        if isinstance(dataset, Dataset) and FACTORS in dataset.column_names:
            return dataset
        if packing and (args.packing_strategy != "bfd" or args.max_length is None):
            raise ValueError(
                f"packing_strategy={args.packing_strategy!r}, max_length={args.max_length}: packs of whole "
                "trajectories need packing_strategy='bfd' and a max_length; the others cut some, and half of one has "
                "no mean nll"
            )
        unpacked = copy(args)
        if packing:
            unpacked.truncation_mode = "keep_start"  # as TRL's packing cuts
        dataset = weighted_rows(dataset, dataset_name, required=required)
        dataset = super()._prepare_dataset(dataset, processing_class, unpacked, False, formatting_func, dataset_name)
        dataset = with_factors(dataset, dataset_name, self.loss_norm)
        if packing:
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, {"num_proc": args.dataset_num_proc})
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
        return dataset

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As ``WeightedLoss``, and TRL's count of the tokens seen."""
        tokens = (
            inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(inputs["labels"].numel())
        )
        if model.training:
            tokens = self.accelerator.gather_for_metrics(tokens.to(inputs["labels"].device)).sum().item()
            self._total_train_tokens += tokens // self.get_tp_size()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return super().compute_loss(model, inputs, *args, **kwargs)
