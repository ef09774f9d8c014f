"""AdamW in its forms: torch's own, with moments in 8 bits, and for bfloat16 weights without a float32 copy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from lark_fast.errors import UserError
from lark_fast.training.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what is trained; matrices alone decay.

    Raises:
        UserError: a library is missing, or does not take sharded parameters.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    common = {"lr": config.lr, "betas": config.betas}
    if config.stochastic_rounding:
        return StochasticAdamW(groups, **common)
    if config.optimizer == "adamw8bit":
        if any(isinstance(p, DTensor) for p in trained):
            raise UserError("--optimizer adamw8bit does not take parameters sharded over ranks; use adamw")
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError("--optimizer adamw8bit needs bitsandbytes: pip install 'lark-fast[optim]'") from error
        return AdamW8bit(groups, **common)
    device = trained[0].device.type
    return torch.optim.AdamW(groups, **common, fused=device in ("cpu", "cuda"))


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW on bfloat16 weights: moments and step in float32, the new weight rounded up or down by chance.

    The mean over the draws is the float32 weight, so steps far below bfloat16's spacing (2^-8 of a weight) are not
    lost. The draws come from torch's generator of the device. Source: arXiv 2010.06192, section 3.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: of the denominator.
        weight_decay: decoupled, as a share of lr.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step on the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=_local(parameter).device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        weight, gradient = _local(parameter), _local(parameter.grad).float()
        exact = weight.float()
        adamw(
            [exact],
            [gradient],
            [_local(state["exp_avg"])],
            [_local(state["exp_avg_sq"])],
            [],
            [state["step"]],
            fused=weight.is_cuda or weight.device.type == "cpu",
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        weight.copy_(round_stochastically(exact) if weight.dtype == torch.bfloat16 else exact)


def round_stochastically(values: Tensor) -> Tensor:
    """Float32 values as bfloat16: up or down, each with the chance that makes the mean right; NaN and inf stay."""
    bits = values.view(torch.int32)
    drawn = (bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)
    return drawn.view(torch.float32).where(values.isfinite(), values).bfloat16()


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
