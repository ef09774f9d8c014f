"""One step of training: the weighted loss of a global batch, its gradient, and AdamW. No files, no display."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lark_fast.kernels.linear_cross_entropy import linear_cross_entropy
from lark_fast.student import Student
from lark_fast.training.batches import MicroBatch, collate, global_batch, micro_batches, steps_per_epoch
from lark_fast.training.config import TrainConfig
from lark_fast.training.data import TrainingSet
from lark_fast.training.objective import learning_rate, mean_weight, token_weights


@dataclass(frozen=True, slots=True)
class Measured:
    """A global batch under the present weights; its gradient, clipped, waits in the parameters."""

    rows: np.ndarray  # [n]
    loss: float  # sum c nll / sum c over the scored tokens, c being their weights: nats a token
    grad_norm: float  # before clipping
    tokens: int  # input tokens, padding not counted


class Trainer:
    """A student, its optimiser and its data. A step depends on its number, counted from 0, and on the weights only.

    Args:
        student: in float32; it is trained in place.
        data: the training set.
        config: see ``TrainConfig``.
        bfloat16: run the forward and backward pass under bfloat16 autocast.
    """

    def __init__(self, student: Student, data: TrainingSet, config: TrainConfig, *, bfloat16: bool) -> None:
        self.student, self.data, self.config, self.bfloat16 = student, data, config, bfloat16
        self.model = student.model.requires_grad_(True)
        if config.gradient_checkpointing:
            # Later releases of Transformers give the same switch another name.
            new = getattr(self.model, "activation_checkpointing_enable", None)
            (new or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        self.steps_per_epoch = steps_per_epoch(len(data), config.global_batch)
        self.steps = config.epochs * self.steps_per_epoch
        self._mean_weight = mean_weight(data.weights, data.n_scored, config.loss_norm)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.betas,
            fused=student.device.type in ("cpu", "cuda"),
        )

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.steps, self.config.lr, self.config.warmup_ratio)

    def measure(self, step: int) -> Measured:
        """Loss and gradient of the step's global batch; the weights stay as they are."""
        config, data = self.config, self.data
        # Dropout draws from (seed, step), so that a resumed run needs no generator's state.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1, np.uint64)[0]))
        self.model.train()
        self.optimizer.zero_grad()
        rows = global_batch(step, len(data), config.global_batch, config.seed)
        device = self.student.device
        objective = torch.zeros((), device=device)
        total_weight = 0.0
        for part in micro_batches(rows, data.lengths, config.micro_batch, device):
            weights = token_weights(
                data.weights[part],
                data.n_scored[part],
                batch_size=len(rows),
                mean=self._mean_weight,
                loss_norm=config.loss_norm,
            )
            loss = self._loss(collate(data, part, weights, device))
            loss.backward()
            objective += loss.detach()
            total_weight += float(weights @ data.n_scored[part])
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if config.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), config.clip, norm)
        objective, norm = torch.stack([objective, norm.to(objective)]).tolist()
        return Measured(rows, objective / total_weight, norm, int(data.lengths[rows].sum()))

    def update(self, step: int) -> None:
        """Move the weights along the gradient that ``measure`` left."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, data: TrainingSet) -> float:
        """Mean over held-out trajectories of nll_i, unweighted."""
        self.model.eval()
        device = self.student.device
        total = torch.zeros((), device=device)
        for part in micro_batches(np.arange(len(data)), data.lengths, self.config.micro_batch, device):
            weights = token_weights(
                np.ones(len(part)), data.n_scored[part], batch_size=len(data), mean=1.0, loss_norm="trajectory"
            )
            total += self._loss(collate(data, part, weights, device))
        return total.item()

    def _loss(self, batch: MicroBatch) -> Tensor:
        """Sum over the scored tokens of weight x nll."""
        device = self.student.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            hidden = self.student.hidden(batch.input_ids)  # [B, T, D]
        hidden = hidden.flatten(0, 1).index_select(0, batch.predicts)  # [S, D]
        head = self.student.head
        # On a CPU the head multiplies in float32 whatever it is given: there, rounding would only cost digits.
        operand = torch.bfloat16 if self.bfloat16 and device.type != "cpu" else head.weight.dtype
        return linear_cross_entropy(
            hidden.to(operand),
            head.weight.to(operand),
            batch.labels,
            batch.token_weights,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
