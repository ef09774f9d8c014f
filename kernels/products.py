"""Matrix products whose sums and results are float32, whatever the operands: written into memory, or added to it."""

import functools

import torch
from torch import Tensor

SLICE_BYTES = 64 << 20  # of a product that has to exist before it is added


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out`` [M, N] = ``a`` [M, K] @ ``b`` [K, N]; summed in float32 or better, and rounded once, to out's dtype."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        wide = torch.promote_types(a.dtype, torch.float32)
        out.copy_(torch.mm(a.to(wide), b.to(wide)))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total`` [M, N] += ``a`` [M, K] @ ``b`` [K, N], ``total`` being float32, or float64 for float64 operands."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and _adds_wide(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        step = max(1, SLICE_BYTES // (4 * total.shape[1]))
        for start in range(0, len(total), step):
            some = slice(start, start + step)
            part = torch.empty_like(total[some])
            write_product(part, a[some], b)
            total[some] += part


@functools.cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library adds such a product to float32 numbers in one go: releases of torch differ."""
    ones = torch.ones(64, 64, dtype=dtype, device=device)
    total = torch.ones(64, 64, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 65).all())
