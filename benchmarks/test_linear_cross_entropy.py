"""``linear_cross_entropy``, forward and backward, beside its three bare matrix products.

FLOP of the limit: 3 x 2 T D V (logits, gradient of hidden, gradient of weight).
"""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.comparison import DEVICE, compare, optional_peer
from lark_fast.kernels.linear_cross_entropy import linear_cross_entropy

if DEVICE.type == "cuda":  # Qwen2.5-7B and -0.5B
    SHAPES = [(8192, 3584, 152064, torch.bfloat16), (8192, 896, 151936, torch.bfloat16)]
else:
    SHAPES = [(512, 256, 8192, torch.float32), (256, 256, 151936, torch.float32)]


def gradients(loss, hidden, weight):
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def eager(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def check(ours, hidden, weight, labels):
    double = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = gradients(F.cross_entropy(double[0] @ double[1].T, labels), *double)
    for own, expected in zip(ours, truth, strict=True):
        error = (own.double() - expected).norm() / expected.norm()
        assert error < (1e-5 if hidden.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("T", "D", "V", "dtype"), SHAPES)
def test_linear_cross_entropy(benchmark, T, D, V, dtype):
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(T, D, generator=g, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=g, device=DEVICE) * 3 / math.sqrt(D)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,), generator=g, device=DEVICE)
    losses = {"eager": eager}
    if hasattr(F, "linear_cross_entropy"):
        losses["torch's linear_cross_entropy"] = F.linear_cross_entropy
    if liger := optional_peer("liger_kernel.transformers.fused_linear_cross_entropy", needs_cuda=True):
        fused = liger.LigerFusedLinearCrossEntropyLoss()
        losses["Liger"] = lambda h, w, y: fused(w, h, y)
    if cce := optional_peer("cut_cross_entropy", needs_cuda=True):
        losses["cut-cross-entropy"] = cce.linear_cross_entropy

    @torch.no_grad()
    def three_products():
        logits = hidden @ weight.T
        return logits @ weight, logits.T @ hidden

    compare(
        benchmark,
        "linear cross entropy, forward + backward",
        lambda: gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight),
        limit=three_products,
        peers={
            name: lambda loss=loss: gradients(loss(hidden, weight, labels), hidden, weight)
            for name, loss in losses.items()
        },
        check=lambda results: check(results["ours"], hidden, weight, labels),
        shape=f"T={T} D={D} V={V}",
        dtype=str(dtype).removeprefix("torch."),
    )
