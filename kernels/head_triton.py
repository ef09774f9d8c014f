"""head.py as Triton code, to be used inside kernels."""

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
