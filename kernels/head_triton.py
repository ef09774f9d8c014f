"""head.py as Triton code, to be used inside kernels: products of hidden states and words, and what becomes of them."""

import triton
import triton.language as tl

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
        # tanh(u) = 1 - 2 / (e^(2u) + 1), whose ends are right because exp overflows to inf and underflows to 0.
        x = softcap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E / softcap)) + 1.0))
    return x


@triton.jit
def product(
    hidden, weight, row, word, D: tl.constexpr, stride_hidden, stride_weight,
    ROWS: tl.constexpr, WORDS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr, RAISE: tl.constexpr,
):  # fmt: skip
    """hidden[row] x weight[word]^T -> [ROWS, WORDS] float32; row [ROWS] and word [WORDS] int64, all in range.

    RAISE multiplies the operands as float32: Triton's interpreter takes bfloat16 for integers.
    """
    inner = tl.arange(0, INNER)
    h = hidden + row[:, None] * stride_hidden + inner[None, :]
    w = weight + word[None, :] * stride_weight + inner[:, None]
    total = tl.zeros([ROWS, WORDS], tl.float32)
    for k in range(0, D, INNER):
        if D % INNER == 0:
            a = tl.load(h)
            b = tl.load(w)
        else:
            a = tl.load(h, mask=inner[None, :] < D - k, other=0.0)
            b = tl.load(w, mask=inner[:, None] < D - k, other=0.0)
        if RAISE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        h += INNER
        w += INNER
    return total
