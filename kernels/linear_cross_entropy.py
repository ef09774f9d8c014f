"""Weighted cross entropy straight from hidden states, with its gradients, without the [T, V] logits.

    loss = sum_t c_t nll_t,   nll_t = logsumexp(z_t) - z_t[y_t],   z_t = logits of hidden_t (kernels/head.py)

A block of rows is taken through logits, nll and gradient while its logits exist, so a step costs three matrix products
(logits, gradient of hidden, gradient of weight) and nothing is computed twice. With x = hidden @ weight.T + bias,

    d loss / d x_t = c_t * logit_scale * (1 - (z_t / softcap)^2) * (softmax(z_t) - onehot(y_t))

With m = max(z_t), a = e^(z_y - m) and S' = sum over v != y of e^(z_v - m), nll = log1p(S'/a) where S' < a, and
softmax - onehot at y is -S'/(S' + a): for confident tokens the plain forms, log(S' + a) - (z_y - m) and p_y - 1,
subtract numbers that agree in every digit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lark_fast.kernels.head import Head, accumulation_dtype, head_logits
from lark_fast.kernels.head_operands import IGNORE_INDEX, check_operands, count_scored

# Logits that exist at one time. A CPU wants them in its cache; a GPU wants many rows for each pass over weight.
CPU_LOGITS = 1 << 22
GPU_LOGITS = 1 << 27
MIN_ROWS = 256  # fewer than this starve the products of both, however large the vocabulary


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss of rows that all count. The gradients are made in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [T, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        labels: Tensor,  # [T]
        token_weights: Tensor,  # [T]
        softcap: float | None,
        logit_scale: float | None,
    ) -> Tensor:
        dtype = accumulation_dtype(hidden.dtype)
        inputs = (hidden, weight, bias)
        gradients = [
            torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format) if needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        ctx.gradients = gradients
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        differentiable = any(ctx.needs_input_grad)
        operand = _operand_dtype(hidden, weight)
        hidden, weight = hidden.detach().to(operand), weight.detach().to(operand)
        bias = None if bias is None else bias.detach()
        row_scale = token_weights if logit_scale is None else token_weights * logit_scale  # [T]
        block = max(MIN_ROWS, (GPU_LOGITS if hidden.is_cuda else CPU_LOGITS) // len(weight))
        loss = hidden.new_zeros((), dtype=dtype)
        for start in range(0, len(hidden), block):
            rows = slice(start, start + block)
            logits = head_logits(hidden[rows], weight, bias, softcap, logit_scale)  # [block, V]
            slope = 1 - (logits / softcap) ** 2 if differentiable and softcap is not None else None
            nll, error = _nll_and_error(logits, labels[rows])
            loss += torch.dot(nll, token_weights[rows])
            if differentiable:
                error *= row_scale[rows].unsqueeze(1)
                if slope is not None:
                    error *= slope
                _add_gradients(gradients, rows, error, hidden[rows], weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the matrix products read: bfloat16 where a GPU multiplies two bf16 operands with float32 output, else the
    accumulation dtype. float16 is raised to float32: gradients of small weights would underflow in it."""
    both_bfloat16 = hidden.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if both_bfloat16 and hidden.is_cuda else accumulation_dtype(hidden.dtype)


def _nll_and_error(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """nll ``[T]`` and its gradient softmax - onehot ``[T, V]``, which takes the place of ``logits``."""
    column = labels.unsqueeze(1)
    m = logits.amax(1, keepdim=True)
    x = logits.gather(1, column) - m
    a = x.exp()
    e = logits.sub_(m).exp_().scatter_(1, column, 0.0)
    others = e.sum(1, keepdim=True)
    total = others + a
    nll = torch.where(others < a, (others / a).log1p(), total.log() - x)
    error = e.div_(total).scatter_(1, column, -others / total)
    return nll.squeeze(1), error


def _add_gradients(gradients: list[Tensor | None], rows: slice, error: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Add what some rows give, ``error`` [T, V] being the gradient of their logits before bias and scale."""
    of_hidden, of_weight, of_bias = gradients
    if of_bias is not None:
        of_bias += error.sum(0)
    operand = error.to(weight.dtype)
    if of_hidden is not None:
        of_hidden[rows] = _product(operand, weight, of_hidden.dtype)
    if of_weight is not None and operand.dtype == of_weight.dtype:
        of_weight.addmm_(operand.T, hidden)
    elif of_weight is not None:
        of_weight += _product(operand.T, hidden, of_weight.dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    impl: str = "auto",
) -> Tensor:
    """``sum_t token_weights[t] * nll[t]`` over the labels that are not ignored, in nats; without weights, their mean.

    Differentiable once in ``hidden``, ``weight`` and ``bias``; gradients are summed in float32 or better and handed out
    in their tensor's own dtype. Rows that are ignored or weigh 0 are never computed: their values, NaN included, do not
    matter.

    Autocast has no say here: the operands' own dtypes decide. Two bf16 operands are multiplied as bf16 with float32
    sums and logits; everything else is multiplied in float32. So a caller under autocast who holds float32 master
    weights and wants the fast products passes ``hidden.bfloat16()`` and ``weight.bfloat16()``.

    Args:
        hidden: ``[T, D]`` inputs of the output embedding; row t predicts ``labels[t]``.
        weight: ``[V, D]`` output embedding.
        labels: ``[T]`` int64 in [0, V), or ``ignore_index``.
        token_weights: ``[T]`` constants, or None for the mean over the labels that are not ignored.
        bias: ``[V]`` or None.
        softcap: cap of the logits (Gemma-2), or None.
        logit_scale: factor on the logits (Cohere; 1 / Granite's ``logits_scaling``), or None.
        ignore_index: label of rows to leave out.
        impl: "auto" or "torch"; both are the blocked torch form in this build.

    Returns:
        Scalar, float32 (float64 for float64 ``hidden``); 0 where no row counts.

    Raises:
        ValueError: shapes that do not fit, a label outside [0, V), ``token_weights`` that ask for a gradient, an
            unknown ``impl``.
    """
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl={impl!r}: this build has 'auto' and 'torch'")
    _check(hidden, Head(weight, bias, softcap, logit_scale), labels, token_weights, ignore_index)
    token_weights = _weights(hidden, labels, token_weights, ignore_index)
    counts = token_weights != 0
    if not counts.all():
        hidden, labels, token_weights = hidden[counts], labels[counts], token_weights[counts]
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels, token_weights, softcap, logit_scale)


def linear_cross_entropy_naive(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The definition with all logits at once, differentiated by autograd; arguments as ``linear_cross_entropy``."""
    _check(hidden, Head(weight, bias, softcap, logit_scale), labels, token_weights, ignore_index)
    token_weights = _weights(hidden, labels, token_weights, ignore_index)
    z = head_logits(hidden, weight, bias, softcap, logit_scale)
    label = labels.where(labels != ignore_index, 0).unsqueeze(1)
    nll = (z.logsumexp(1, keepdim=True) - z.gather(1, label)).squeeze(1)
    return (token_weights * nll).sum()


def _weights(hidden: Tensor, labels: Tensor, token_weights: Tensor | None, ignore_index: int) -> Tensor:
    """``[T]`` in the accumulation dtype, 0 where the label is ignored."""
    dtype = accumulation_dtype(hidden.dtype)
    scored = labels != ignore_index
    if token_weights is None:
        return scored.to(dtype) / scored.sum().clamp(min=1)
    return token_weights.to(dtype).where(scored, 0.0)


def _check(hidden: Tensor, head: Head, labels: Tensor, token_weights: Tensor | None, ignore_index: int) -> None:
    check_operands(hidden, head, labels, None)
    count_scored(labels, len(head.weight), ignore_index)
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"token_weights is [T] = [{labels.shape[0]}], not {tuple(token_weights.shape)}")
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError("token_weights are constants: pass token_weights.detach()")
