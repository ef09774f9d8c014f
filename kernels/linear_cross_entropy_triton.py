"""The weighted loss on a GPU. Both forms write the error d loss / d x; its products are the library's.

    chunked   the error takes the place of a block's logits, which the library has made
    fused     a tile of logits is made anew and leaves the chip as error only

Formulas: linear_cross_entropy.py; where a row's sums come from: softmax_sums.py. No program adds to what another one
writes, so the results are the same bits on every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from lark_fast.kernels import logits_triton, softmax_sums, softmax_sums_triton
from lark_fast.kernels.dispatch import HeadConfig, head_config
from lark_fast.kernels.head import Head, head_logits
from lark_fast.kernels.head_triton import finish_logits, finish_numbers, product
from lark_fast.kernels.linear_cross_entropy import NLL, operands, token_losses
from lark_fast.kernels.products import add_product, write_product
from lark_fast.kernels.softmax_sums_triton import LOG2_E
from lark_fast.kernels.token_stats_triton import head_flags, head_sizes

COLUMNS, NUM_WARPS = 4096, 8  # of logits that a program turns into errors at a time
CHUNK_BYTES = 128 << 20  # of errors of the fused form: many words for each pass over the hidden states
WORD_STEP = 256  # a multiple of every tile's words
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ROW_GROUP = 8  # blocks of rows whose tiles run together: their hidden states and the words they meet stay in the L2


@triton.jit
def error_of(z, column, label, m, factor, label_error, softcap, HAS_CAP: tl.constexpr):
    """Gradient [R, C] of the products that logits z [R, C] of words column [C] were made of.

    Of each row [R]: label, and what ``row_terms`` gives.
    """
    error = tl.exp2((z - m[:, None]) * LOG2_E) * factor[:, None]
    error = tl.where(column[None, :] == label[:, None], label_error[:, None], error)
    if HAS_CAP:
        capped = z / softcap
        error *= 1.0 - capped * capped
    return error


@triton.jit
def _rounded(x, LOW: tl.constexpr):
    """float32 x, or with LOW the nearest bfloat16."""
    if INTERPRETED and LOW:  # the interpreter would cut digits off where a GPU rounds to the nearest
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16) if LOW else x


@triton.jit
def _row(labels, terms, place, n_rows):
    """Label, m, factor and label_error of places [R]; those of the last one behind the end."""
    inside = tl.minimum(place, n_rows - 1)
    own = terms + inside
    return tl.load(labels + inside), tl.load(own), tl.load(own + n_rows), tl.load(own + 2 * n_rows)


@triton.jit(do_not_specialize=["n_rows"])
def _errors_of_logits(
    logits, errors, bias, labels, terms, n_rows, n_columns, stride, stride_errors, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr, LOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Logits [n_rows, n_columns] -> errors, a row a program. They may begin where the row begins, in its memory."""
    place = tl.program_id(0) + tl.arange(0, 1)
    label, m, factor, label_error = _row(labels, terms, place, n_rows)
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, n_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        here = (column < n_columns)[None, :]
        z = tl.load(logits + row * stride + column[None, :], mask=here, other=0.0)
        own_bias = 0.0
        if HAS_BIAS:
            own_bias = tl.load(bias + column[None, :], mask=here, other=0.0).to(tl.float32)
        z = finish_logits(z, own_bias, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)
        error = error_of(z, column, label, m, factor, label_error, softcap, HAS_CAP)
        # Errors of half the width end up where logits of this turn or an earlier one were: all warps have read theirs.
        tl.debug_barrier()
        tl.store(errors + row * stride_errors + column[None, :], _rounded(error, LOW), mask=here)


@triton.jit(do_not_specialize=["n_rows", "n_words", "first_word", "end_word"])
def _errors(
    hidden, weight, bias, labels, terms, errors,
    n_rows, first_word, end_word, stride_errors, n_words, stride_hidden, stride_weight, logit_scale, softcap,
    D: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, INNER: tl.constexpr, SLICES: tl.constexpr, GROUP: tl.constexpr,
    BOXES: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, RAISE: tl.constexpr,
):  # fmt: skip
    """Errors [n_rows, end_word - first_word] of a chunk of words, a tile a program."""
    n_tiles = tl.cdiv(end_word - first_word, WORDS)
    first = tl.program_id(0) // (GROUP * n_tiles) * GROUP
    members = tl.minimum(tl.cdiv(n_rows, ROWS) - first, GROUP)
    within = tl.program_id(0) % (GROUP * n_tiles)
    first_row = (first + within % members) * ROWS
    tile = first_word + within // members * WORDS
    place = first_row + tl.arange(0, ROWS)
    row = first_row if BOXES else tl.minimum(place, n_rows - 1).to(tl.int64)
    word = tile if BOXES else tl.minimum(tile + tl.arange(0, WORDS), n_words - 1).to(tl.int64)
    x = product(
        hidden, weight, row, word, D, stride_hidden, stride_weight, ROWS, WORDS, INNER, BOXES, BOXES, PRECISION, RAISE
    )  # fmt: skip
    label, m, factor, label_error = _row(labels, terms, place, n_rows)
    label = label.to(tl.int32)
    if SLICES == 2:
        left, right = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, WORDS // 2]), [0, 2, 1]))
    for s in tl.static_range(SLICES):
        part = x if SLICES == 1 else (left if s == 0 else right)
        column = tile + s * (WORDS // SLICES) + tl.arange(0, WORDS // SLICES)
        own_bias = tl.load(bias + tl.minimum(column, n_words - 1)).to(tl.float32)[None, :] if HAS_BIAS else 0.0
        z = finish_logits(part, own_bias, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)
        error = _rounded(error_of(z, column, label, m, factor, label_error, softcap, HAS_CAP), LOW)
        if BOXES:  # what lies behind the end is not written
            errors.store([first_row, tile - first_word + s * (WORDS // SLICES)], error)
        else:
            out = errors + place.to(tl.int64)[:, None] * stride_errors + (column - first_word)[None, :]
            tl.store(out, error, mask=(place < n_rows)[:, None] & (column < end_word)[None, :])


def row_terms(partials: Tensor, label_logit: Tensor, nll: Tensor, row_scale: Tensor) -> Tensor:
    """m, factor and label_error of every row, ``[3, T]`` float32: its errors are factor * e^(z - m), and label_error.

    Args:
        partials: ``[splits, 5, T]`` sums over the words that are not the label.
        label_logit: ``[T]``.
        nll: ``[T]``; where it is NaN, so is the row.
        row_scale: ``[T]`` c * logit_scale.
    """
    sums = softmax_sums.merge(partials)
    m = torch.maximum(sums[0], label_logit)
    others = softmax_sums.move(sums, m)[1]
    factor = (row_scale / (others + (label_logit - m).exp())).masked_fill(nll.isnan(), float("nan"))
    return torch.stack([m, factor, -factor * others])


def triton_error(hidden: Tensor, head: Head, labels: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """``BlockError``: the error is in the dtype of the operands, and in the memory of the logits."""
    logits = head_logits(hidden, head.weight)
    partials, label_logit = logits_triton.partial_sums(logits, labels, NLL, head=head)
    nll = softmax_sums_triton.finish(partials, label_logit, NLL).nll
    return nll, errors_of_logits(logits, head, labels, row_terms(partials, label_logit, nll, row_scale))


def errors_of_logits(logits: Tensor, head: Head, labels: Tensor, terms: Tensor) -> Tensor:
    """Errors ``[R, V]`` in the dtype of ``head.weight``, and in the memory of ``logits``.

    Args:
        logits: ``[R, V]`` float32, contiguous: products that still lack bias, softcap and scale; overwritten.
        head: those.
        labels: ``[R]`` int64.
        terms: ``[3, R]``: ``row_terms``.
    """
    n_rows, n_columns = logits.shape
    errors = logits.view(head.weight.dtype)[:, :n_columns]
    _errors_of_logits[(n_rows,)](
        logits, errors, head.bias, labels, terms, n_rows, n_columns, logits.stride(0), errors.stride(0),
        *finish_numbers(head), HAS_BIAS=head.bias is not None, HAS_SCALE=head.logit_scale is not None,
        HAS_CAP=head.softcap is not None, COLUMNS=COLUMNS, LOW=errors.dtype == torch.bfloat16, num_warps=NUM_WARPS,
    )  # fmt: skip
    return errors


def write_errors(
    errors: Tensor, hidden: Tensor, head: Head, labels: Tensor, terms: Tensor, first_word: int,
    config: HeadConfig | None = None,
) -> None:  # fmt: skip
    """Fill ``errors`` with those of the words from ``first_word`` on.

    Args:
        errors: ``[T, C]``, last axis contiguous, rows a multiple of 16 bytes apart.
        hidden: ``[T, D]``, last axis contiguous.
        head: weight ``[V, D]``, last axis contiguous, in the dtype of ``hidden``.
        labels: ``[T]`` int64.
        terms: ``[3, T]``: ``row_terms``.
        first_word: the word of the first column.
        config: how to cut the work; None takes the table's.
    """
    config = config or head_config(hidden, head)
    (n_rows, n_words), weight = errors.shape, head.weight
    if not n_rows:
        return
    of_hidden = TensorDescriptor.from_tensor(hidden, [config.rows, config.inner]) if config.boxes else hidden
    of_weight = TensorDescriptor.from_tensor(weight, [config.words, config.inner]) if config.boxes else weight
    of_errors = errors
    if config.boxes:
        of_errors = TensorDescriptor.from_tensor(errors, [config.rows, config.words // config.slices])
    _errors[(triton.cdiv(n_rows, config.rows) * triton.cdiv(n_words, config.words),)](
        of_hidden, of_weight, head.bias, labels, terms, of_errors,
        n_rows, first_word, first_word + n_words, errors.stride(0), *head_sizes(hidden, head),
        **head_flags(hidden, None, head), ROWS=config.rows, WORDS=config.words, INNER=config.inner,
        SLICES=config.slices, GROUP=ROW_GROUP, BOXES=config.boxes, LOW=errors.dtype == torch.bfloat16,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


class _RecomputedLoss(torch.autograd.Function):
    """Loss of rows that all count. The forward pass keeps two numbers of each; the backward pass, the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        token_weights: Tensor,
        softcap: float | None,
        logit_scale: float | None,
        operand: torch.dtype,
    ) -> Tensor:
        ctx.rest = softcap, logit_scale, operand
        low, head, words = operands(hidden, Head(weight, bias, softcap, logit_scale), labels, operand)
        nll, partials, label_logit = token_losses("fused", low, head, words)
        row_scale = token_weights if logit_scale is None else token_weights * logit_scale
        ctx.save_for_backward(hidden, weight, bias, labels, row_terms(partials, label_logit, nll, row_scale))
        return torch.dot(nll, token_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, terms = ctx.saved_tensors
        softcap, logit_scale, operand = ctx.rest
        terms = torch.cat([terms[:1], terms[1:] * upstream])
        low, head, words = operands(hidden, Head(weight, bias, softcap, logit_scale), labels, operand)
        wanted = [
            tensor.dtype if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
            return (*_gradients(low, head, words, terms, wanted), *(None,) * 5)


def recomputed_loss(*arguments: Any) -> Tensor:
    """Fused: the loss; arguments as ``linear_cross_entropy._BlockwiseLoss`` less the last."""
    return _RecomputedLoss.apply(*arguments)


def _gradients(
    hidden: Tensor, head: Head, labels: Tensor, terms: Tensor, wanted: list[torch.dtype | None]
) -> tuple[Tensor | None, ...]:
    """Of hidden, weight and bias, each in the dtype that is wanted, if one is."""
    (n_rows, _), n_words = hidden.shape, len(head.weight)
    of_hidden = None if wanted[0] is None else torch.zeros_like(hidden, dtype=torch.float32)
    of_weight = None if wanted[1] is None else torch.empty_like(head.weight, dtype=wanted[1])
    of_bias = None if wanted[2] is None else torch.empty_like(head.bias, dtype=wanted[2])
    step = max(WORD_STEP, CHUNK_BYTES // (hidden.element_size() * max(1, n_rows)) // WORD_STEP * WORD_STEP)
    errors = hidden.new_empty(n_rows, min(step, triton.cdiv(n_words, WORD_STEP) * WORD_STEP))
    for start in range(0, n_words, step):
        words = slice(start, min(start + step, n_words))
        chunk = errors[:, : words.stop - start]
        write_errors(chunk, hidden, head, labels, terms, start)
        if of_bias is not None:
            of_bias[words] = chunk.sum(0, dtype=torch.float32)
        if of_weight is not None:
            write_product(of_weight[words], chunk.T, hidden)
        if of_hidden is not None:
            add_product(of_hidden, chunk, head.weight[words])
    del errors, chunk  # before there are two gradients of hidden
    return None if of_hidden is None else of_hidden.to(wanted[0]), of_weight, of_bias
