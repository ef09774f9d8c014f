"""fp8.py's rounding as one Triton kernel.

A program owns a row and reads it twice: for its largest number and, while it is still in the cache, for its codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lark_fast.kernels import fp8

LARGEST = tl.constexpr(fp8.LARGEST)
SMALLEST_PEAK = tl.constexpr(fp8.SMALLEST_PEAK)
MOST_COLUMNS = 8192  # of a step


@triton.jit
def _codes_of(x, NATIVE: tl.constexpr):
    """The e4m3 code of each x [N] float32, |x| <= 448 or NaN, as a byte."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:  # older chips have no instruction for it, and Triton's interpreter (3.9) rounds 127.9 to 64
        bits = tl.abs(x).to(tl.int32, bitcast=True)
        # Half of the last kept place less one, and one more where that place is odd: ties go to even.
        rounded = bits + 0x7FFFF + ((bits >> 20) & 1)
        normal = (rounded >> 20) - ((127 - 7) << 3)
        # Below 2^-6 the places are 2^-9; in whole numbers, where no compiler contracts a product with a sum.
        mantissa = (bits & 0x7FFFFF) | 0x800000
        shift = tl.minimum(20 + 121 - (bits >> 23), 26)
        shift = tl.maximum(shift, 1)
        small = (mantissa + (1 << (shift - 1)) - 1 + ((mantissa >> shift) & 1)) >> shift
        code = tl.where(bits < 0x3C800000, small, normal)
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        return tl.where(x == x, code | sign, 0x7F).to(tl.uint8)


@triton.jit
def _quantise(x, codes, scales, n_columns, stride, BLOCK: tl.constexpr, NATIVE: tl.constexpr):
    """Rows of x [R, n_columns], ``stride`` apart -> codes [R, n_columns] bytes, scales [R]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_columns, BLOCK):
        here = start + column < n_columns
        size = tl.abs(tl.load(x + row * stride + start + column, mask=here, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, size)  # which may leave NaN out
        broken += (size < float("inf")).to(tl.int32) ^ 1
    peak = tl.maximum(tl.max(largest, 0), SMALLEST_PEAK)
    peak = tl.where(tl.sum(broken, 0) == 0, peak, float("nan"))
    factor = tl.div_rn(tl.full([], LARGEST, tl.float32), peak)
    tl.store(scales + row, tl.div_rn(peak, tl.full([], LARGEST, tl.float32)))
    for start in range(0, n_columns, BLOCK):
        here = start + column < n_columns
        number = tl.load(x + row * stride + start + column, mask=here, other=0.0).to(tl.float32)
        tl.store(codes + row * n_columns + start + column, _codes_of(number * factor, NATIVE), mask=here)


def quantise_on_device(x: Tensor, native: bool) -> tuple[Tensor, Tensor]:
    """One launch.

    Args:
        x: ``[R, K]``; a row whose numbers do not lie side by side is copied first.
        native: whether the chip rounds to e4m3 itself.

    Returns:
        Codes ``[R, K]`` float8_e4m3fn and scales ``[R, 1]`` float32.
    """
    n_rows, n_columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(n_rows, n_columns, dtype=torch.uint8, device=x.device)
    scales = torch.empty(n_rows, 1, dtype=torch.float32, device=x.device)
    if n_rows:
        block = min(triton.next_power_of_2(max(n_columns, 1)), MOST_COLUMNS)
        with torch.cuda.device_of(x):
            _quantise[(n_rows,)](
                x, codes, scales, n_columns, x.stride(0), BLOCK=block, NATIVE=native,
                num_warps=4 if block <= 2048 else 8,
            )  # fmt: skip
    return codes.view(torch.float8_e4m3fn), scales
