"""Matrices in FP8 (e4m3: 3 bits of mantissa, up to 448) with a scale a row, and products of them.

    s_r = max_k |x_rk| / 448      q_rk = x_rk / s_r, rounded to the nearest e4m3 (ties to even)      x_rk ~ s_r q_rk

so nothing overflows and nothing has to be calibrated: a row (a token, an output of a weight) brings its own scale. A
number loses at most 2^-4 of itself, or 2^-10 s_r where it is more than 2^14.8 times smaller than the row's largest.

    y = x W^T + b   ~   y_rn = s_r t_n sum_k q_rk w_nk + b_n

On a GPU the sum is torch._scaled_mm's, on its FP8 units: compute capability 8.9 at least, both sizes of W multiples of
16, W row-major (its transpose, which is what is passed, column-major), scales float32 [R, 1] and [1, N], a bfloat16
result (torch/_meta_registrations.py, ``_check_scaled_mm_sizes``; aten/src/ATen/native/cuda/ScaledBlas.cpp). It sums as
the units do, in about 22 bits (``use_fast_accum``; pytorch#147971): 2^-13 where the operands were rounded by 2^-4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lark_fast.kernels.dispatch import kernel_form

LARGEST = 448.0  # of e4m3
SMALLEST_PEAK = 448.0 * 2.0**-126  # a row below it is taken for one with this largest number: scales stay normal
MULTIPLE = 16  # of both sizes of a weight


class Quantised(NamedTuple):
    """Rows in FP8."""

    codes: Tensor  # [R, K] float8_e4m3fn
    scale: Tensor  # [R, 1] float32


def quantise_rows(x: Tensor, *, impl: str = "auto") -> Quantised:
    """A matrix in FP8 with a scale a row.

    A row of zeros has codes of 0. A row with NaN or an infinite number stands for NaN in all places: nothing broken is
    hidden.

    Args:
        x: ``[R, K]`` float32, bfloat16 or float16.
        impl: "triton", "torch", or "auto": Triton on a CUDA device where it is installed, else torch. The same bits.

    Raises:
        ValueError: another shape or dtype, an unknown ``impl`` or one that cannot run here.
    """
    _check_rows(x)
    if kernel_form(impl, x.device) == "torch":
        return quantise_rows_naive(x)
    from lark_fast.kernels.fp8_triton import quantise_on_device  # Triton may be missing

    return Quantised(*quantise_on_device(x, native=_converts(x.device)))


def quantise_rows_naive(x: Tensor) -> Quantised:
    """The definition in plain torch; arguments and result as ``quantise_rows``."""
    _check_rows(x)
    wide = x.float()
    if x.shape[1] == 0:
        return Quantised(wide.to(torch.float8_e4m3fn), wide.new_full((len(x), 1), SMALLEST_PEAK / LARGEST))
    peak = wide.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_PEAK)
    peak = peak.masked_fill(peak.isinf(), torch.nan)
    largest = torch.full_like(peak, LARGEST)  # with a number, torch multiplies by a reciprocal: other last bits
    return Quantised((wide * (largest / peak)).to(torch.float8_e4m3fn), peak / largest)


def dequantised(x: Quantised) -> Tensor:
    """``[R, K]`` float32, the numbers that it stands for."""
    return x.codes.float() * x.scale


def fp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """x W^T + b, both operands in FP8.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16; each row along K has a scale of its own.
        weight: ``[N, K]`` float8_e4m3fn, as ``quantise_rows`` makes it.
        weight_scale: ``[N, 1]`` float32.
        bias: ``[N]``.
        impl: as in ``fp8_product``.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ValueError: as ``quantise_rows`` and ``fp8_product``.
    """
    rows = quantise_rows(x.reshape(-1, x.shape[-1]), impl=impl)
    product = fp8_product(rows, Quantised(weight, weight_scale), bias, dtype=x.dtype, impl=impl)
    return product.unflatten(0, x.shape[:-1])


def fp8_product(
    x: Quantised, weight: Quantised, bias: Tensor | None = None, *, dtype: torch.dtype, impl: str = "auto"
) -> Tensor:
    """x W^T + b of matrices that are in FP8 already, so that several weights can share an x.

    Args:
        x: ``[R, K]``.
        weight: ``[N, K]``.
        bias: ``[N]``.
        dtype: of the result.
        impl: "torch": the same numbers, multiplied in float32 and rounded once, to ``dtype``. "triton" (the name that
            ``quantise_rows`` has for it): torch._scaled_mm, whose result and bias are bfloat16. "auto" as there.

    Returns:
        ``[R, N]``.

    Raises:
        ValueError: shapes that do not fit; with torch._scaled_mm sizes of the weight that are no multiples of 16.
    """
    shapes = [list(part.shape) for part in (x.codes, x.scale, weight.codes, weight.scale)]
    (n, k), rows = weight.codes.shape, len(x.codes)
    if shapes[0] != [rows, k] or shapes[1] != [rows, 1] or shapes[3] != [n, 1]:
        raise ValueError(f"x is [R, K] with scales [R, 1] and weight [N, K] with [N, 1], not {shapes}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias is [N] = [{n}], not {list(bias.shape)}")
    if kernel_form(impl, x.codes.device) == "torch":
        return fp8_product_naive(x, weight, bias, dtype)
    if n % MULTIPLE or k % MULTIPLE:
        raise ValueError(f"weight [N, K] = [{n}, {k}]: both are multiples of {MULTIPLE} for FP8 products")
    return library_product(x, weight, bias, dtype)


def fp8_product_naive(x: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``fp8_product`` with impl="torch", of operands that fit."""
    product = dequantised(x) @ dequantised(weight).T
    return (product if bias is None else product + bias.float()).to(dtype)


def library_product(x: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``fp8_product`` by torch._scaled_mm, of operands that fit."""
    product = torch._scaled_mm(
        x.codes,
        weight.codes.T,
        scale_a=x.scale,
        scale_b=weight.scale.T,
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product.to(dtype)


def _check_rows(x: Tensor) -> None:
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is [R, K] float32, bfloat16 or float16, not {list(x.shape)} {x.dtype}")


def _converts(device: torch.device) -> bool:
    """Whether the device has an instruction that rounds to e4m3."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)
