"""One step of training: the weighted loss of a global batch, its gradient, and AdamW. No files, no display."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lark_fast.batch import Batch
from lark_fast.kernels.softmax_sums import TokenStats
from lark_fast.kernels.trajectory_reduce import TrajectoryReduction, trajectory_reduce
from lark_fast.student import Student
from lark_fast.training.batches import collate, default_tokens, global_batch, micro_batches, of_rank, steps_per_epoch
from lark_fast.training.config import TrainConfig
from lark_fast.training.data import TrainingSet
from lark_fast.training.model import prepare, release_parameters
from lark_fast.training.objective import learning_rate, mean_weight, token_weights
from lark_fast.training.optimizers import make_optimizer
from lark_fast.world import ALONE, World


@dataclass(frozen=True, slots=True)
class Measured:
    """A global batch under the present weights; its gradient, clipped, waits in the parameters."""

    rows: np.ndarray  # [n]
    loss: float  # sum c nll / sum c over the scored tokens, c being their weights: nats a token
    grad_norm: float  # before clipping
    tokens: int  # input tokens, padding not counted
    scored: int  # of these


class Trainer:
    """A student, its optimiser and its data. A step depends on its number, counted from 0, and on the weights only.

    Args:
        student: in float32, but for what is not trained or is rounded stochastically; it is trained in place.
        data: the training set, the same on every rank.
        config: see ``TrainConfig``.
        bfloat16: multiply in bfloat16.
        world: the ranks that share the work.

    Attributes:
        adapters: the ``PeftModel`` that writes them, or None where all weights are trained.
    """

    def __init__(
        self, student: Student, data: TrainingSet, config: TrainConfig, *, bfloat16: bool, world: World = ALONE
    ) -> None:
        self.student, self.data, self.config, self.world, self.model = student, data, config, world, student.model
        self.loss, self.adapters = prepare(student, config, world, bfloat16=bfloat16)
        self.optimizer = make_optimizer(self.model, config)
        self.steps_per_epoch = steps_per_epoch(len(data), config.global_batch)
        self.steps = min(config.epochs * self.steps_per_epoch, config.max_steps or 2**63)
        self._mean_weight = mean_weight(data.weights, data.n_scored, config.loss_norm)

    @property
    def trained(self) -> dict[str, Tensor]:
        """What is trained, by name; of a sharded model this rank's part is in each."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.steps, self.config.lr, self.config.warmup_ratio)

    def measure(self, step: int) -> Measured:
        """Loss and gradient of the step's global batch; the weights stay as they are."""
        config, data = self.config, self.data
        self._seed(step)
        self.model.train()
        self.optimizer.zero_grad()
        rows = global_batch(step, len(data), config.global_batch, config.seed)
        device, ranks = self.student.device, self.world.size
        objective = torch.zeros((), device=device)
        with self.loss.running():
            for batch in self._batches(data, rows):
                own = np.asarray(batch.members, dtype=np.int64)
                factors = token_weights(
                    data.weights[own],
                    data.n_scored[own],
                    batch_size=len(rows),
                    mean=self._mean_weight,
                    loss_norm=config.loss_norm,
                )
                # Sharded gradients are averaged over the ranks, and their sum is meant.
                factors = torch.from_numpy(np.repeat(factors * ranks, data.n_scored[own]).astype(np.float32))
                factors = factors.pin_memory() if device.type == "cuda" else factors
                loss = self.loss(batch.on(device), factors.to(device, non_blocking=True))
                loss.backward()
                objective += loss.detach() / ranks
        norm = self._clip()
        objective, norm = torch.stack([self.world.sum(objective), norm.to(objective)]).tolist()
        relative = mean_weight(data.weights[rows], data.n_scored[rows], config.loss_norm) / self._mean_weight
        tokens, scored = int(data.lengths[rows].sum()), int(data.n_scored[rows].sum())
        return Measured(rows, objective / relative, norm, tokens, scored)

    def update(self, step: int) -> None:
        """Move the weights along the gradient that ``measure`` left."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self._seed(step)  # of stochastic rounding
        self.optimizer.step()

    def evaluate(self, data: TrainingSet) -> float:
        """Mean over held-out trajectories of nll_i, unweighted."""
        return reduce_nll(self.nll(data), data).means.nll.mean().item()

    @torch.no_grad()
    def nll(self, data: TrainingSet) -> Tensor:
        """nll of every scored token, in the order of the data: ``[sum(n_scored)]`` float32 on the CPU of every rank."""
        self.model.eval()
        ends = np.cumsum(data.n_scored)
        found = torch.zeros(int(ends[-1]))
        with self.loss.running():
            for batch in self._batches(data, np.arange(len(data))):
                places = [torch.arange(ends[row] - data.n_scored[row], ends[row]) for row in batch.members]
                nll = self.loss(batch.on(self.student.device))
                if places:
                    found[torch.cat(places)] = nll.cpu()
        release_parameters(self.loss)
        return self.world.sum(found.to(self.student.device)).cpu() if self.world.size > 1 else found

    def _batches(self, data: TrainingSet, rows: np.ndarray) -> Iterator[Batch]:
        """This rank's forward passes over some rows."""
        config, device, packed = self.config, self.student.device, self.loss.packed
        tokens = config.tokens_per_batch or default_tokens(device)
        parts = micro_batches(
            rows,
            data.lengths,
            size=config.micro_batch,
            tokens=tokens,
            packed=packed,
            border=self.student.length_regime,
            ranks=self.world.size,
        )
        for part in of_rank(parts, data.lengths, self.world.rank, self.world.size):
            fill_to = tokens if config.compile and packed else 0
            yield collate(data, part, packed=packed, pinned=device.type == "cuda", fill_to=fill_to)

    def _clip(self) -> Tensor:
        """Clip the gradient; its norm before that, over all ranks."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _seed(self, step: int) -> None:
        """Chance draws from (seed, step, rank), so that a resumed run needs no generator's state."""
        entropy = [self.config.seed, step] + ([self.world.rank] if self.world.rank else [])
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def reduce_nll(nll: Tensor, data: TrainingSet, nll_before: Tensor | None = None) -> TrajectoryReduction:
    """Means over trajectories of tokens' nll ``[sum(n_scored)]``, and with an earlier state's the loss delta."""
    stats = TokenStats(nll=nll, brier=None, entropy=None, rank=None, agreement=None, brier_topk=None)
    ends = torch.from_numpy(np.concatenate([[0], np.cumsum(data.n_scored)]))
    return trajectory_reduce(stats, ends, nll_before=nll_before)
