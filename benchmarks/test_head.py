"""``token_stats``, the scoring head, beside the bare matrix product of its shapes.

FLOP of the limit: 2 T D V. Whatever else the head does, one exponential and a few sums a logit, is above it.
"""

import math
from functools import partial

import pytest
import torch

from benchmarks.comparison import DEVICE, compare, optional_peer
from benchmarks.eager import eager_exact, eager_topk, in_chunks
from lark_fast.kernels.token_stats import token_stats, token_stats_naive

TOP_K = 50
CHECKED_ROWS = 16  # of the float64 definition, which sorts every logit
if DEVICE.type == "cuda":  # Qwen2.5-7B and -0.5B
    SHAPES = [(8192, 3584, 152064, torch.bfloat16), (8192, 896, 151936, torch.bfloat16)]
    CHUNK = 1024
else:
    SHAPES = [
        (512, 256, 8192, torch.float32),
        (512, 256, 8192, torch.bfloat16),
        (256, 896, 151936, torch.float32),
    ]
    CHUNK = 64


def inputs(T, D, V, dtype):
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(T, D, generator=g, device=DEVICE).to(dtype)
    # Logits with a standard deviation of 3 and every second label the most probable word: peaked, as a student's are.
    weight = (torch.randn(V, D, generator=g, device=DEVICE) * 3 / math.sqrt(D)).to(dtype)
    labels = torch.randint(0, V, (T,), generator=g, device=DEVICE)
    labels[::2] = (hidden[::2] @ weight.T).argmax(1)
    return hidden, weight, labels


def check(ours, hidden, weight, labels, top_k):
    some = slice(None, None, max(1, len(labels) // CHECKED_ROWS))
    truth = token_stats_naive(hidden[some], weight, labels[some], top_k=top_k)
    for name in ("nll", "brier", "entropy") if top_k is None else ("nll", "brier", "entropy", "brier_topk"):
        own = getattr(ours, name)[some].double()
        torch.testing.assert_close(own, getattr(truth, name), rtol=2e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    # Float32 products may order two logits that are closer than their rounding the other way.
    assert ((ours.rank[some] - truth.rank).abs() <= 1 + 1e-3 * truth.rank).all()


@pytest.mark.parametrize("top_k", [None, TOP_K], ids=["exact", "topk"])
@pytest.mark.parametrize(("T", "D", "V", "dtype"), SHAPES)
@torch.no_grad()
def test_token_stats(benchmark, T, D, V, dtype, top_k):
    hidden, weight, labels = inputs(T, D, V, dtype)
    statistics = eager_exact if top_k is None else partial(eager_topk, top_k=top_k)
    peers = {
        "eager": lambda: statistics(hidden @ weight.T, labels),
        "eager in chunks": lambda: in_chunks(statistics, hidden, weight, labels, CHUNK),
    }
    if DEVICE.type == "cuda":
        compiled = torch.compile(lambda h, w, y: statistics(h @ w.T, y))
        peers["compiled"] = lambda: compiled(hidden, weight, labels)
        if cce := optional_peer("cut_cross_entropy"):
            peers["cut-cross-entropy (nll only)"] = lambda: cce.linear_cross_entropy(
                hidden, weight, labels, reduction="none"
            )
    compare(
        benchmark,
        "head, exact" if top_k is None else f"head, top-k {top_k}",
        lambda: token_stats(hidden, weight, labels, top_k=top_k),
        limit=lambda: hidden @ weight.T,
        peers=peers,
        check=lambda results: check(results["ours"], hidden, weight, labels, top_k),
        shape=f"T={T} D={D} V={V}",
        dtype=str(dtype).removeprefix("torch."),
    )
