"""head.py as Triton code, to be used inside kernels: products of hidden states and words, and what becomes of them."""

import triton
import triton.language as tl

from lark_fast.kernels.head import Head
from lark_fast.kernels.softmax_sums_triton import LOG2_E


@triton.jit
def finish_logits(
    x, bias, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr
):  # fmt: skip
    """Bias, scale and cap of float32 products ``x``; ``bias`` broadcasts to it."""
    if HAS_BIAS:
        x += bias
    if HAS_SCALE:
        x *= logit_scale
    if HAS_CAP:
        # tanh(u) = 1 - 2 / (e^(2u) + 1), whose ends are right because exp overflows to inf and underflows to 0. Near 0
        # it cancels, and the series' first terms are right to float32's last digit.
        u = x / softcap
        square = u * u
        series = u * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        x = softcap * tl.where(tl.abs(u) < 0.2, series, 1.0 - 2.0 / (tl.exp2(u * (2.0 * LOG2_E)) + 1.0))
    return x


@triton.jit
def product(
    hidden, weight, row, word, D: tl.constexpr, stride_hidden, stride_weight,
    ROWS: tl.constexpr, WORDS: tl.constexpr, INNER: tl.constexpr, ROW_BOXES: tl.constexpr, WORD_BOXES: tl.constexpr,
    PRECISION: tl.constexpr, RAISE: tl.constexpr,
):  # fmt: skip
    """hidden[row] x weight[word]^T -> [ROWS, WORDS] float32.

    hidden and row [ROWS], weight and word [WORDS]: a pointer and int64 places, all in range. With ROW_BOXES or
    WORD_BOXES, a tensor descriptor and the first place of consecutive ones, of which some may lie behind the end (those
    give 0): the GPU's copy engine then brings the operand. RAISE multiplies the operands as float32: Triton's
    interpreter takes bfloat16 for integers.
    """
    inner = tl.arange(0, INNER)
    if not ROW_BOXES:
        h = hidden + row[:, None] * stride_hidden + inner[None, :]
    if not WORD_BOXES:
        w = weight + word[None, :] * stride_weight + inner[:, None]
    total = tl.zeros([ROWS, WORDS], tl.float32)
    for k in range(0, D, INNER):
        if ROW_BOXES:
            a = hidden.load([row, k])
        else:
            a = tl.load(h) if D % INNER == 0 else tl.load(h, mask=inner[None, :] < D - k, other=0.0)
            h += INNER
        if WORD_BOXES:
            b = weight.load([word, k]).T
        else:
            b = tl.load(w) if D % INNER == 0 else tl.load(w, mask=inner[:, None] < D - k, other=0.0)
            w += INNER
        if RAISE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


def finish_numbers(head: Head) -> tuple[float, float]:
    """What ``finish_logits`` takes for logit_scale and softcap: floats, since whole numbers make another kernel."""
    return tuple(1.0 if number is None else float(number) for number in (head.logit_scale, head.softcap))
