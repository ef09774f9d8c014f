"""Weighted cross entropy straight from hidden states, with its gradients, without the [T, V] logits.

    loss = sum_t c_t nll_t,   nll_t = logsumexp(z_t) - z_t[y_t],   z_t = logits of hidden_t (kernels/head.py)

With x = hidden @ weight.T + bias,

    d loss / d x_t = c_t * logit_scale * (1 - (z_t / softcap)^2) * (softmax(z_t) - onehot(y_t))

With m = max(z_t), a = e^(z_y - m) and S' = sum over v != y of e^(z_v - m), nll = log1p(S'/a) where S' < a, and
softmax - onehot at y is -S'/(S' + a): for confident tokens the plain forms, log(S' + a) - (z_y - m) and p_y - 1,
subtract numbers that agree in every digit.

Three forms give the same numbers (dispatch.py picks one):

    chunked   the library's logits of a block of rows become d loss / d x in their own memory, and the library's
              products take that into the gradients: three products, and nothing is computed twice
    fused     the forward pass keeps two numbers a row; the backward pass makes the logits anew, a chunk of words at a
              time, so that each row of the weight's gradient is written once: four products, and the least memory
    torch     as chunked, in plain torch

The first two are in linear_cross_entropy_triton.py. Without a gradient to make, the loss is token_stats's nll.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lark_fast.kernels import dispatch
from lark_fast.kernels.head import Head, accumulation_dtype, head_logits
from lark_fast.kernels.head_operands import IGNORE_INDEX, check_operands, count_scored, for_kernels
from lark_fast.kernels.products import add_product, write_product
from lark_fast.kernels.softmax_sums import Wanted
from lark_fast.kernels.token_stats import form as head_form

# Logits that exist at one time. Each block of rows reads and writes the gradient of weight, so a GPU wants few, unless
# weight is frozen; a CPU wants its products fed and not much memory taken.
CPU_LOGITS = 1 << 22
GPU_LOGITS, GPU_FROZEN_LOGITS = 1 << 28, 1 << 26  # 1 GiB and 256 MiB of float32
CPU_MIN_ROWS, GPU_MIN_ROWS = 256, 1024  # fewer starve the products, however large the vocabulary
ROW_STEP = 128  # of a GPU's products
LOG2_E = math.log2(math.e)
NLL = Wanted(brier=False, entropy=False, rank=False)

# (hidden [R, D], head, labels [R], row_scale [R]) -> nll [R] and the error d loss / d x [R, V], row_scale being
# c * logit_scale; in accumulation_dtype, except that the error may have the operands' own.
BlockError = Callable[[Tensor, Head, Tensor, Tensor], tuple[Tensor, Tensor]]


class _BlockwiseLoss(torch.autograd.Function):
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
        operand: torch.dtype,
        block_error: BlockError,
    ) -> Tensor:
        dtype = accumulation_dtype(operand)
        inputs = (hidden, weight, bias)
        make = torch.empty_like if len(hidden) else torch.zeros_like
        gradients = [
            make(tensor, dtype=dtype, memory_format=torch.contiguous_format) if needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        hidden, head, labels = operands(hidden, Head(weight, bias, softcap, logit_scale), labels, operand)
        row_scale = token_weights if logit_scale is None else token_weights * logit_scale  # [T]
        block = _block_rows(hidden, head, frozen=gradients[1] is None)
        loss = token_weights.new_zeros((), dtype=dtype)
        for start in range(0, len(hidden), block):
            rows = slice(start, start + block)
            nll, error = block_error(hidden[rows], head, labels[rows], row_scale[rows])
            loss += torch.dot(nll, token_weights[rows])
            _add_gradients(gradients, rows, error, hidden[rows], head.weight)
            del error  # before the next block's logits are there
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else _scaled(gradient, upstream, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, *(None,) * 6)


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * upstream`` in ``dtype``: in gradient's own memory where nobody can ask for it again."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    reused = gradient.dtype == dtype and not kept
    return torch.mul(gradient, upstream, out=gradient if reused else torch.empty_like(gradient, dtype=dtype))


def operands(hidden: Tensor, head: Head, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Head, Tensor]:
    """What the products read, in ``dtype`` and as kernels take it; nothing of it is differentiated."""
    weight, bias = head.weight.detach().to(dtype), None if head.bias is None else head.bias.detach()
    head = Head(weight, bias, head.softcap, head.logit_scale)
    hidden, _, head, labels = for_kernels(hidden.detach().to(dtype), None, head, labels.long())
    return hidden, head, labels


def _block_rows(hidden: Tensor, head: Head, *, frozen: bool) -> int:
    """Rows of a block, all blocks being about as large."""
    n_rows, n_words = max(1, len(hidden)), len(head.weight)
    if not hidden.is_cuda:
        return max(CPU_MIN_ROWS, CPU_LOGITS // n_words)
    most = (GPU_FROZEN_LOGITS if frozen else GPU_LOGITS) // n_words
    most = max(ROW_STEP if frozen else GPU_MIN_ROWS, most // ROW_STEP * ROW_STEP)
    n_blocks = -(-n_rows // most)
    return -(-n_rows // n_blocks // ROW_STEP) * ROW_STEP


def _torch_error(hidden: Tensor, head: Head, labels: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """``BlockError`` in plain torch: the error takes the place of the logits."""
    z = head.logits(hidden)
    slope = None if head.softcap is None else 1 - (z / head.softcap) ** 2
    label, row_scale = labels.unsqueeze(1), row_scale.unsqueeze(1)
    m = z.amax(1, keepdim=True)
    x = z.gather(1, label) - m
    a = x.exp()
    # On a CPU, torch's exp takes twice the time of its exp2, and ten times where the result underflows.
    z.sub_(m).mul_(LOG2_E).exp2_().scatter_(1, label, 0.0)
    others = z.sum(1, keepdim=True)
    total = others + a
    nll = torch.where(others < a, (others / a).log1p(), total.log() - x)
    error = z.mul_(row_scale / total).scatter_(1, label, -row_scale * others / total)
    if slope is not None:
        error *= slope
    return nll.squeeze(1), error


def _add_gradients(gradients: list[Tensor | None], rows: slice, error: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Take in what a block of rows gives, ``error`` [R, V] being the gradient of their products; the first block writes
    what the others add to."""
    of_hidden, of_weight, of_bias = gradients
    first = rows.start == 0
    if of_bias is not None:
        total = error.sum(0, dtype=of_bias.dtype)
        of_bias.copy_(total if first else of_bias + total)
    error = error.to(weight.dtype)
    if of_hidden is not None:
        write_product(of_hidden[rows], error, weight)
    if of_weight is not None:
        (write_product if first else add_product)(of_weight, error.T, hidden)


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
    operand_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """``sum_t token_weights[t] * nll[t]`` over the labels that are not ignored, in nats; without weights, their mean.

    Differentiable once in ``hidden``, ``weight`` and ``bias``; gradients are summed in float32 or better and handed out
    in their tensor's own dtype, rounded once. Those that nobody asks for are not made. Loss and gradients are the same,
    bit for bit, on every run: nothing is added in an order that is left to chance. Rows that are ignored or weigh 0 are
    never computed: their values, NaN included, do not matter.

    Autocast has no say here: the operands' own dtypes, or ``operand_dtype``, decide. On a GPU, bf16 operands are
    multiplied with float32 sums and logits; what the gradients are multiplied from, the error of the logits, is bf16
    then. All else is multiplied in float32, and so is everything on a CPU, where bf16 would only cost digits.

    Args:
        hidden: ``[T, D]`` inputs of the output embedding; row t predicts ``labels[t]``.
        weight: ``[V, D]`` output embedding.
        labels: ``[T]`` int64 in [0, V), or ``ignore_index``.
        token_weights: ``[T]`` constants, or None for the mean over the labels that are not ignored.
        bias: ``[V]`` or None.
        softcap: cap of the logits (Gemma-2), or None.
        logit_scale: factor on the logits (Cohere; 1 / Granite's ``logits_scaling``), or None.
        ignore_index: label of rows to leave out.
        operand_dtype: what the products read: bfloat16, float32, or None: bfloat16 where ``hidden`` and ``weight`` both
            are. With bfloat16, a float32 weight is rounded for the products alone: its gradient comes in float32.
        impl: "auto", or one of the forms: "fused", "chunked", "torch"; "triton" is whichever of the first two suits.

    Returns:
        Scalar, float32 (float64 for float64 ``hidden``); 0 where no row counts.

    Raises:
        ValueError: shapes that do not fit, a label outside [0, V), ``token_weights`` that ask for a gradient, another
            ``operand_dtype``, an unknown ``impl``, or one that cannot run on this device or these dtypes.
    """
    head = Head(weight, bias, softcap, logit_scale)
    _check(hidden, head, labels, token_weights)
    operand = _operand_dtype(hidden, weight, operand_dtype, impl)
    if token_weights is not None:
        labels = labels.masked_fill(token_weights == 0, ignore_index)
    n_counting = count_scored(labels, len(weight), ignore_index)
    token_weights = _weights(labels, token_weights, ignore_index, accumulation_dtype(operand))
    if n_counting < len(labels):
        rows = (labels == ignore_index).int().argsort(stable=True)[:n_counting]
        hidden, labels, token_weights = (tensor.index_select(0, rows) for tensor in (hidden, labels, token_weights))
    differentiable = any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        if not (differentiable and torch.is_grad_enabled()):
            hidden, head, labels = operands(hidden, head, labels, operand)
            nll, *_ = token_losses(dispatch.head_form(impl, hidden, head.weight), hidden, head, labels)
            return torch.dot(nll, token_weights)
        form = dispatch.loss_form(impl, hidden, weight, operand)
        arguments = (hidden, weight, bias, labels, token_weights, softcap, logit_scale, operand)
        if form == "torch":
            return _BlockwiseLoss.apply(*arguments, _torch_error)
        from lark_fast.kernels.linear_cross_entropy_triton import recomputed_loss, triton_error

        return recomputed_loss(*arguments) if form == "fused" else _BlockwiseLoss.apply(*arguments, triton_error)


def token_losses(name: str, hidden: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """nll ``[T]`` by a form of the head, and what it is made of: partial sums ``[splits, 5, T]``, only m and S1' of
    which are there, and the labels' logits ``[T]``."""
    with torch.no_grad():
        form = head_form(name)
        label_logit = form.label_logits(hidden, None, head, labels)
        partials = form.partial_sums(hidden, None, head, labels, label_logit, NLL)
        return form.finish(partials, label_logit, NLL).nll, partials, label_logit


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
    _check(hidden, Head(weight, bias, softcap, logit_scale), labels, token_weights)
    count_scored(labels, len(weight), ignore_index)
    token_weights = _weights(labels, token_weights, ignore_index, accumulation_dtype(hidden.dtype))
    z = head_logits(hidden, weight, bias, softcap, logit_scale)
    label = labels.where(labels != ignore_index, 0).unsqueeze(1)
    nll = (z.logsumexp(1, keepdim=True) - z.gather(1, label)).squeeze(1)
    return (token_weights * nll).sum()


def _operand_dtype(hidden: Tensor, weight: Tensor, asked: torch.dtype | None, impl: str) -> torch.dtype:
    """What the matrix products read. float16 is raised to float32: gradients of small weights would underflow in it."""
    if asked not in (None, torch.bfloat16, torch.float32):
        raise ValueError(f"operand_dtype={asked}: torch.bfloat16, torch.float32 or None")
    low = asked == torch.bfloat16 or (asked is None and hidden.dtype == weight.dtype == torch.bfloat16)
    multiplies_low = hidden.is_cuda or impl not in ("auto", "torch")  # in Triton's interpreter, kernels are as on a GPU
    return torch.bfloat16 if low and multiplies_low else accumulation_dtype(hidden.dtype)


def _weights(labels: Tensor, token_weights: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """``[T]`` in ``dtype``, 0 where the label is ignored."""
    scored = labels != ignore_index
    if token_weights is None:
        return scored.to(dtype) / scored.sum().clamp(min=1)
    return token_weights.to(dtype).where(scored, 0.0)


def _check(hidden: Tensor, head: Head, labels: Tensor, token_weights: Tensor | None) -> None:
    check_operands(hidden, head, labels, None)
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"token_weights is [T] = [{labels.shape[0]}], not {tuple(token_weights.shape)}")
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError("token_weights are constants: pass token_weights.detach()")
