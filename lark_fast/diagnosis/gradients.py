"""Gradients of single trajectories by autograd, their inner products, and steps along them that are taken back."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lark_fast.batch import make_batch
from lark_fast.diagnosis.config import Parameters
from lark_fast.errors import UserError
from lark_fast.memory import available_memory
from lark_fast.packing import length_batches, packs
from lark_fast.rendering.renderer import Rendered
from lark_fast.student import Student
from lark_fast.training.batches import default_tokens
from lark_fast.training.config import LoraOptions, TrainConfig
from lark_fast.training.model import WeightedLoss, add_adapters
from lark_fast.training.objective import token_weights
from lark_fast.training.optimizers import make_optimizer

_MEMORY_SHARE = 0.5  # of what is free, for gradients that are held
_STEP = 5  # gradient, two moments, the parameters before it, and what is left for activations
_COLUMNS = 1 << 20  # of gradients that are multiplied in float64 at a time


class Gradients:
    """The q-weighted loss of some trajectories as a function of some of the student's parameters.

    The loss is sum_k q_k nll_k with nll_k the mean over the trajectory's scored tokens, as in training; dropout is off.

    Args:
        student: its parameters are left as they are, but for adapters, which stay, and a tied head, which is untied.
        parameters: see ``DiagnoseConfig``.
        seed: of adapters.

    Raises:
        UserError: no memory for two gradients; peft is missing.
    """

    def __init__(self, student: Student, parameters: Parameters, *, seed: int = 0) -> None:
        self.student, self._packed = student, student.unpackable is None
        model = student.model
        if parameters == "lora":
            with torch.random.fork_rng([student.device] if student.device.type == "cuda" else []):
                torch.manual_seed(seed)
                add_adapters(student, LoraOptions())
        else:
            model.requires_grad_(parameters == "all")
            if parameters == "last-layer":  # one that is tied must not take the embedding along
                output = model.get_output_embeddings()
                output.weight = torch.nn.Parameter(output.weight.detach().clone())
            for part in (student.head.weight, student.head.bias) if parameters == "last-layer" else ():
                if part is not None:
                    part.requires_grad_(True)
        model.eval()
        self._loss = WeightedLoss(
            student, bfloat16=False, packed=self._packed, compiled=False, head_alone=parameters == "last-layer"
        )
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.size = sum(parameter.numel() for parameter in self._parameters)
        self._dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        self._held = self._how_many_fit()

    def gram(self, rows: Sequence[Rendered], other: Rendered | None = None) -> NDArray[np.float64]:
        """Inner products of the trajectories' gradients, summed in float64.

        Args:
            rows: K trajectories.
            other: one more, the last row and column of the result.

        Returns:
            ``[K, K]``, or ``[K + 1, K + 1]``. Not finite where a gradient is not.
        """
        every = [*rows, *([] if other is None else [other])]
        gram = np.zeros((len(every), len(every)))
        fitting = min(len(every), self._held)
        buffer = torch.empty((fitting, self.size), dtype=self._dtype, device=self.student.device)
        # As many as fit are held; where that is not all, the others come past once for each such block.
        block = fitting if fitting == len(every) else fitting - 1
        for start in range(0, len(every), block):
            held = range(start, min(start + block, len(every)))
            for place, row in enumerate(held):
                self._write_gradient(every[row], buffer[place])
            own = _products(buffer[: len(held)], buffer[: len(held)])
            gram[held.start : held.stop, held.start : held.stop] = own
            for row in range(held.stop, len(every)):
                self._write_gradient(every[row], buffer[-1])
                between = _products(buffer[: len(held)], buffer[-1:])
                gram[held.start : held.stop, row] = between[:, 0]
                gram[row, held.start : held.stop] = between[:, 0]
        return gram

    def losses_around_step(
        self, rows: Sequence[Rendered], q: ArrayLike, *, lr: float, steps: int, adaptive: bool
    ) -> tuple[float, float]:
        """L_q before and after some steps on it; the parameters are as they were afterwards.

        Args:
            rows: K trajectories; those of weight 0 are left out.
            q: ``[K]``.
            lr: the same for each step.
            steps: how many.
            adaptive: AdamW, as in training but for clipping; else plain gradient descent.

        Returns:
            Both in nats a token; not finite where the steps blow up.
        """
        q = np.asarray(q, dtype=np.float64)
        chosen = [(row, weight) for row, weight in zip(rows, q.tolist(), strict=True) if weight > 0]
        begun = [parameter.detach().clone() for parameter in self._parameters]
        # Its own parameters are those that require gradients: those of the loss.
        settings = TrainConfig(data="", student=self.student.path, out="", lr=lr)
        optimizer = (
            make_optimizer(self.student.model, settings) if adaptive else torch.optim.SGD(self._parameters, lr=lr)
        )
        losses = []
        try:
            for _ in range(steps):
                optimizer.zero_grad()
                losses.append(self._accumulate(chosen))
                optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                losses.append(sum(float(loss) for loss in self._passes(chosen)))
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, begun)
        return losses[0], losses[-1]

    def _write_gradient(self, row: Rendered, into: Tensor) -> None:
        """``[P]`` the gradient of a trajectory's nll."""
        # Through .grad and not autograd.grad, which takes no parameter that the loss does not reach.
        self._accumulate([(row, 1.0)])
        start = 0
        for parameter in self._parameters:
            part = into[start : start + parameter.numel()]
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad.flatten())
            start += parameter.numel()
            parameter.grad = None

    def _accumulate(self, chosen: Sequence[tuple[Rendered, float]]) -> float:
        """Add up the gradient of the weighted loss in the parameters; the loss."""
        total = 0.0
        for loss in self._passes(chosen):
            loss.backward()
            total += float(loss.detach())
        return total

    def _passes(self, chosen: Sequence[tuple[Rendered, float]]) -> Iterator[Tensor]:
        """Parts of the weighted loss, a forward pass each."""
        device = self.student.device
        lengths = [len(row.input_ids) for row, _ in chosen]
        group = packs if self._packed else length_batches
        for members in group(lengths, default_tokens(device), self.student.length_regime):
            sequences = [(chosen[member][0].input_ids, chosen[member][0].labels) for member in members]
            n_scored = np.array([chosen[member][0].n_scored for member in members])
            weights = np.array([chosen[member][1] for member in members])
            factors = token_weights(weights, n_scored, batch_size=1, mean=1.0, loss_norm="trajectory")
            batch = make_batch(members, sequences, packed=self._packed, pinned=False)
            per_token = torch.from_numpy(np.repeat(factors, n_scored)).to(device, self._dtype)
            with self._loss.running():
                yield self._loss(batch.on(device), per_token)

    def _how_many_fit(self) -> int:
        """How many gradients can be held; a backward pass needs one more beside them."""
        one = self.size * self._dtype.itemsize
        fitting = available_memory(self.student.device) / one
        if fitting < _STEP:
            raise UserError(
                f"a gradient of {self.size:,} parameters takes {one / 2**30:.1f} GiB, and {_STEP} of that size do not "
                "fit, which a step needs: take --parameters lora or last-layer"
            )
        return max(2, int(_MEMORY_SHARE * fitting) - 1)


def _products(left: Tensor, right: Tensor) -> NDArray[np.float64]:
    """``[A, P]``, ``[B, P]`` -> ``[A, B]``, summed in float64."""
    total = torch.zeros((len(left), len(right)), dtype=torch.float64, device=left.device)
    for start in range(0, left.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        total += left[:, columns].double() @ right[:, columns].double().T
    return total.cpu().numpy()
