"""The weighted objective in Transformers' ``Trainer`` and what is derived from it.

Trainer hands all micro-batches of an update to ``_get_num_items_in_batch`` before the first of them is computed. Here
that counts the trajectories of the update on all ranks: n. The divisor n w_mean is then the same for every micro-batch
and rank (w_mean is in the tokens' factors already), and no number of micro-batches divides anything.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from lark_fast.trainers.collator import EXAMPLE, TRAJECTORIES, WeightedCollator
from lark_fast.trainers.head_loss import HeadLoss
from lark_fast.trainers.weighting import FACTORS
from lark_fast.training.objective import LossNorm

PROBE_LENGTHS = (7, 12, 1, 5)


class WeightedLoss:
    """Goes before ``Trainer`` in a class's bases; the data has gone through ``weighting``.

    Training minimises the objective of ``training/objective.py``; ``loss`` as logged is that of the global batch.
    Evaluation gives, over the whole set, sum w_i nll_i / sum w_i (for loss_norm="token": sum_i w_i sum_t nll_it over
    sum_i w_i T_i), where a set without weights counts every trajectory alike; and the mean entropy and the share of
    right next tokens. Neither makes logits, unless ``compute_metrics`` or ``predict`` asks for them.

    Several ranks are those of DDP; FSDP and DeepSpeed have not been tried. Where a set does not come out even,
    accelerate fills the last batch of an epoch with rows from its beginning, which count like the others there.
    """

    loss_norm: LossNorm

    def _start_weighing(self) -> None:
        """Once ``Trainer.__init__`` has run."""
        self._refuse()
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # what releases before that switch look at
        if not isinstance(self.data_collator, WeightedCollator):
            self.data_collator = WeightedCollator(self.data_collator)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self._head_loss = HeadLoss(base)
        self._evaluated: list[Tensor] = []
        self._check_rows_are_kept_apart()

    def _refuse(self) -> None:
        """Settings that ask for another loss, or cut a trajectory over devices."""
        args, kind = self.args, type(self).__name__
        if (
            self.compute_loss_func is not None
            or args.label_smoothing_factor
            or getattr(args, "loss_type", "nll") != "nll"
        ):
            raise ValueError(f"{kind} has a loss of its own: no compute_loss_func, label_smoothing_factor or loss_type")
        if args.torch_compile:
            raise ValueError(f"{kind} does not compile the whole model: compile its layers (layer.compile()) instead")
        if args.n_gpu > 1:
            raise ValueError(f"{kind} does not run under nn.DataParallel: start it with torchrun or accelerate launch")
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise ValueError(f"{kind} does not spread a sequence over devices (context or sequence parallelism)")

    @torch.no_grad()
    def _check_rows_are_kept_apart(self) -> None:
        """Where the collator lays trajectories into one row, by trial on a few short ones.

        Each must come out as it does by itself, and the same when the first of them is another. The latter is exact in
        low precision too, where the former is blurred.
        """
        model = self.model
        vocab = model.get_input_embeddings().weight.shape[0]
        rows = [
            row.tolist() for row in (1 + 7 * torch.arange(sum(PROBE_LENGTHS))).remainder(vocab).split(PROBE_LENGTHS)
        ]
        if len(self._collated(rows)["input_ids"]) == len(rows):
            return
        was_training = model.training
        model.eval()
        try:
            together = self._probe(rows)
            alone = torch.cat([self._probe([row]) for row in rows if len(row) > 1])
            beside_another = self._probe([[(token + 1) % vocab for token in rows[0]], *rows[1:]])
        finally:
            model.train(was_training)
        low = self.accelerator.mixed_precision != "no" or next(model.parameters()).dtype.itemsize < 4
        others = slice(len(rows[0]) - 1, None)  # a trajectory's first token has no nll
        apart = _close(together, alone, 1e-1 if low else 1e-3)
        if not apart or not _close(together[others], beside_another[others], 1e-2 if low else 1e-4):
            raise ValueError(
                f"trajectories that share a row see each other in {type(model).__name__} with "
                f"attn_implementation={model.config._attn_implementation!r}: load it with another, or turn packing and "
                "padding_free off"
            )

    def _collated(self, rows: list[list[int]]) -> dict[str, Any]:
        return self.data_collator.collator([{"input_ids": row, "labels": row} for row in rows])

    def _probe(self, rows: list[list[int]]) -> Tensor:
        """nll of every token that has one before it in its own sequence."""
        device = next(self.model.parameters()).device
        batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in self._collated(rows).items()}
        with self._head_loss, self.accelerator.autocast():
            nll = self.model(**batch, per_token=True).token_stats.nll
        return nll[batch["labels"][:, 1:].flatten() != -100]

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "seq_lengths", FACTORS]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """n: trajectories, in all micro-batches of all ranks."""
        if not batch_samples:
            return None
        n = torch.stack([batch[TRAJECTORIES].sum() for batch in batch_samples]).sum().to(device)
        if self.args.world_size > 1:
            n = self.accelerator.gather(n).sum() // self.get_tp_size()  # those ranks are given the same batch
        return n

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """This micro-batch's part of the global batch's objective, times the ranks, over which gradients are averaged.

        Args:
            model: the model, wrapped as training has it.
            inputs: of the collator.
            return_outputs: also return the model's outputs, which have no logits.
            num_items_in_batch: n, the trajectories of the global batch; without it, those of this micro-batch.
        """
        inputs = dict(inputs)
        n, factors = inputs.pop(TRAJECTORIES).sum(), inputs.pop(FACTORS)
        inputs.pop(EXAMPLE)
        n = n if num_items_in_batch is None else num_items_in_batch
        with self._head_loss, self.accelerator.autocast():
            outputs = model(**inputs, token_weights=factors / n)
        ranks = self.accelerator.num_processes // self.get_tp_size() if num_items_in_batch is not None else 1
        # The experts' balancing loss is a mean of its micro-batch: averaged over ranks and over micro-batches.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        loss = outputs["loss"] * ranks + self._head_loss.balancing(outputs) / steps
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One batch of an evaluation: the loss of this batch and, if they are asked for, logits and labels."""
        inputs = dict(self._prepare_inputs(inputs))
        n, factors, example = inputs.pop(TRAJECTORIES), inputs.pop(FACTORS), inputs.pop(EXAMPLE)
        with torch.no_grad(), self.accelerator.autocast():
            with self._head_loss:
                stats = model(**inputs, per_token=True).token_stats
            labels = inputs.pop("labels")
            logits = None if prediction_loss_only else model(**inputs).logits
        factors = factors[:, 1:].flatten().double()
        scored = factors != 0
        columns = (factors * stats.nll, factors, stats.entropy, stats.agreement, scored)
        parts = torch.stack([column.double().where(scored, 0.0) for column in columns], 1)  # [b (T - 1), 5]
        rows = parts.new_zeros(len(n), parts.shape[1]).index_add_(0, example[:, 1:].flatten(), parts)  # [B, 5]
        # A row at a time, so that rows given out twice to fill the last batch of several ranks are dropped again.
        self._evaluated.append(self.accelerator.gather_for_metrics(rows).cpu())
        loss = (rows[:, 0].sum() / rows[:, 1].sum()).float()
        return loss, logits, None if prediction_loss_only else labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate; the loss is that of the set, not a mean over batches."""
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._evaluated:
            weighted, factors, entropy, agreement, scored = torch.cat(self._evaluated).sum(0).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = weighted / factors
            output.metrics[f"{metric_key_prefix}_entropy"] = entropy / scored
            output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = agreement / scored
        return output


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())
