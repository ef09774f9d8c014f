"""The output head: how hidden states become float32 logits. Its formula's one home.

    z = softcap * tanh(x / softcap),   x = logit_scale * (hidden @ weight.T + bias)

``softcap`` is Gemma-2's ``final_logit_softcapping``; ``logit_scale`` is Cohere's, or 1 / Granite's ``logits_scaling``.
Low-precision inputs are multiplied with float32 accumulation AND output, under autocast as well: bf16 logits would be
wrong in the first decimal at |z| = 30.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """The output embedding and what a model does to its logits."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float | None = None

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """``hidden`` [T, D] -> logits [T, V]: ``head_logits``."""
        return head_logits(hidden, self.weight, self.bias, self.softcap, self.logit_scale, out)

    def label_logits(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """``hidden`` [T, D] and labels [T] in [0, V) -> [T]: ``label_logits``."""
        return label_logits(hidden, self.weight, labels, self.bias, self.softcap, self.logit_scale)

    def columns(self, start: int, stop: int) -> "Head":
        """The head of some words only; ``stop`` may lie behind the last one."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Head(self.weight[start:stop], bias, self.softcap, self.logit_scale)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits and their sums are kept: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Logits of every row of ``hidden`` for every row of ``weight``.

    Args:
        hidden: ``[T, D]``, any floating dtype.
        weight: ``[V, D]``, rows of the output embedding: all of them, or a block.
        bias: ``[V]`` or None.
        softcap: cap of the logits, or None.
        logit_scale: factor on the logits, or None.
        out: ``[T, V]`` buffer for the result; not under autograd.

    Returns:
        ``[T, V]`` in ``accumulation_dtype(hidden.dtype)``.
    """
    dtype = accumulation_dtype(hidden.dtype)
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype != dtype and not differentiated:
            logits = torch.mm(hidden, weight.T, out_dtype=dtype)
        else:
            logits = torch.mm(hidden.to(dtype), weight.to(dtype).T, out=out)
    return _finish(logits, bias, softcap, logit_scale)


def label_logits(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:
    """Each row's logit for its own label: ``[T]``; arguments as in ``head_logits``, labels ``[T]`` in [0, V).

    The products are summed in float64, so the result is the nearest float32 to the exact logit.
    """
    exact = torch.linalg.vecdot(hidden.double(), weight[labels].double())
    own_bias = None if bias is None else bias[labels]
    return _finish(exact.to(accumulation_dtype(hidden.dtype)), own_bias, softcap, logit_scale)


def _finish(logits: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float | None) -> Tensor:
    """Bias, scale and cap, in place where autograd allows it."""
    keep = torch.is_grad_enabled() and (logits.requires_grad or (bias is not None and bias.requires_grad))
    if bias is not None:
        logits = logits + bias if keep else logits.add_(bias)
    if logit_scale is not None and logit_scale != 1.0:
        logits = logits * logit_scale if keep else logits.mul_(logit_scale)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap if keep else logits.div_(softcap).tanh_().mul_(softcap)
    return logits
