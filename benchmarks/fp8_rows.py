"""``quantise_rows`` as it is benchmarked: the activations of a 7B student's MLP, beside a copy of as many bytes.

Bytes of the limit: 3 a number (bfloat16 read, a byte written), as a copy of 1.5 bytes a number.
"""

import torch

from benchmarks.comparison import DEVICE, Workload
from lark_fast.kernels.dispatch import has_triton
from lark_fast.kernels.fp8 import Quantised, dequantised, fp8_linear, quantise_rows

NAME = "quantise_rows"
CUDA = DEVICE.type == "cuda"
SHAPES = ((8192, 3584), (8192, 18944)) if CUDA else ((512, 3584),)


def inputs(R: int, K: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of different sizes."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(R, K, generator=g, device=DEVICE) * torch.rand(R, 1, generator=g, device=DEVICE)).to(dtype)


def rounding(R: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Workload:
    """Rows in FP8."""
    x = inputs(R, K, dtype)
    source = torch.zeros(x.numel() * 3 // 2, dtype=torch.uint8, device=DEVICE)
    copy = torch.empty_like(source)

    def eager() -> Quantised:
        scale = x.abs().amax(1, keepdim=True).float() / 448
        return Quantised((x / scale).to(torch.float8_e4m3fn), scale)

    return Workload(
        name=NAME,
        shape=f"R={R} K={K}",
        dtype=dtype,
        ours=lambda impl: quantise_rows(x, impl=impl),
        implementations=("triton", "torch") if CUDA and has_triton() else ("torch",),
        limit=lambda: copy.copy_(source),
        peers={"eager torch": eager},
        check=lambda out: check(out, x),
    )


def check(out: Quantised, x: torch.Tensor) -> None:
    """Fails where a number is further from what it stands for than e4m3 allows."""
    assert not [entry for entry in errors(out, x) if not entry["ok"]]


def errors(out: Quantised, x: torch.Tensor) -> list[dict]:
    """The largest errors, in the steps that e4m3 has there: half a step is the best there is."""
    exact, made = x.double(), dequantised(out).double()
    step = torch.maximum(made.abs(), exact.abs()) * 2.0**-3  # at most
    smallest = out.scale.double() * 2.0**-9
    worst = ((made - exact).abs() / torch.maximum(step, smallest)).max()
    return [_entry("codes", float(worst), 0.51)]


def product_errors(x: torch.Tensor, weight: torch.Tensor, impl: str) -> list[dict]:
    """Of a product, against float64 on the same rounded operands: bfloat16 results, sums of about 22 bits."""
    rows = quantise_rows(weight)
    exact = dequantised(quantise_rows(x)).double() @ dequantised(rows).double().T
    made = fp8_linear(x, *rows, impl=impl).double()
    return [_entry("product", float((made - exact).norm() / exact.norm()), 5e-3)]


def _entry(statistic: str, error: float, budget: float) -> dict:
    return {"statistic": statistic, "error": error, "largest_error": error, "budget": budget, "ok": error <= budget}
