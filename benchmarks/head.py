"""The scoring head as it is benchmarked: shapes, inputs, peers, limits and truth, for pytest and ``record`` alike.

FLOP of every head: 2 T D V. Whatever else it does, one exponential and a few sums a logit, is above that.
Bytes of what starts from logits: T V times the size of one, read once.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy import assert_right
from benchmarks.comparison import DEVICE, Run, Workload, note_missing, optional_peer
from benchmarks.eager import eager_exact, eager_nll_brier, eager_topk, in_chunks
from lark_fast.kernels.dispatch import FORMS, has_triton
from lark_fast.kernels.softmax_sums import STATISTICS, TokenStats
from lark_fast.kernels.token_stats import (
    token_stats,
    token_stats_from_logits,
    token_stats_from_logits_naive,
    token_stats_naive,
)

# The workloads by name; peers say in brackets what they give.
ALL, LIGHT, TOPK, ROWS, FROM_LOGITS = "head", "head, nll and brier", "head, top-k", "head, some rows", "from logits"
NLL_BRIER = ("nll", "brier")
TOP_K = 50
CHECKED_ROWS = 48  # of the float64 definition before a timing
CUDA = DEVICE.type == "cuda"
if CUDA:  # Qwen2.5-7B and -0.5B: 1.1 and 0.27 GB of weight, more than any L2 cache
    SHAPES = [(8192, 3584, 152064, torch.bfloat16), (8192, 896, 151936, torch.bfloat16)]
    LOGITS_SHAPES = [(4096, 152064, torch.bfloat16), (4096, 152064, torch.float32)]
    CHUNK = 1024
else:
    SHAPES = [(512, 256, 8192, torch.float32), (512, 256, 8192, torch.bfloat16), (256, 896, 151936, torch.float32)]
    LOGITS_SHAPES = [(512, 32768, torch.float32), (512, 32768, torch.bfloat16)]
    CHUNK = 64

Inputs = tuple[Tensor, Tensor, Tensor]  # hidden [T, D], weight [V, D], labels [T]


def forms() -> tuple[str, ...]:
    """The forms of the head that can be timed here; Triton's interpreter is none."""
    return FORMS if CUDA and has_triton() else ("torch",)


def generator(seed: int) -> torch.Generator:
    """On the device."""
    return torch.Generator(DEVICE).manual_seed(seed)


def inputs(T: int, D: int, V: int, dtype: torch.dtype, g: torch.Generator, logits: str = "peaky") -> Inputs:
    """Operands with logits like a student's.

    "peaky": a third of the tokens has logits of standard deviation 3 and a random label; a third a label that stands
    out, from barely to a logit of 200; a third standard deviation 40 (|z| up to 200) and the likeliest word as label.
    "flat": standard deviation 0.03.
    """
    weight = (torch.randn(V, D, generator=g, device=DEVICE) / math.sqrt(D)).to(dtype)
    hidden = torch.randn(T, D, generator=g, device=DEVICE)
    labels = torch.randint(0, V, (T,), generator=g, device=DEVICE)
    if logits == "flat":
        return (hidden * 0.03).to(dtype), weight, labels
    kind = torch.randint(0, 3, (T,), generator=g, device=DEVICE)
    hidden *= torch.where(kind == 2, 40.0, 3.0).unsqueeze(1)
    own = weight[labels].float()
    stand_out = 10.0 + 190.0 * torch.rand(T, generator=g, device=DEVICE) ** 3  # most of them near the others
    stand_out = torch.where(kind == 1, stand_out / own.square().sum(1), 0.0)
    hidden = (hidden + stand_out.unsqueeze(1) * own).to(dtype)
    labels[kind == 2] = (hidden[kind == 2] @ weight.T).argmax(1)
    return hidden, weight, labels


def head(T: int, D: int, V: int, dtype: torch.dtype, statistics=STATISTICS, top_k: int | None = None) -> Workload:
    """The head from hidden states. With ``top_k``, its limit is the product and one read and write of the logits."""
    hidden, weight, labels = operands = inputs(T, D, V, dtype, generator(0))
    if top_k is not None:
        name, eager, gives, others = TOPK, partial(eager_topk, top_k=top_k), "nll, top-k Brier", {}
    elif set(statistics) == set(STATISTICS):
        name, eager, gives = ALL, eager_exact, "all four"
        others = reference_peer(*operands) | nll_peers(*operands)
    else:
        name, eager, gives, others = LIGHT, eager_nll_brier, "nll, brier", nll_peers(*operands)
    logits = torch.empty(T, V, dtype=dtype, device=DEVICE)
    copy = logits if top_k is None else torch.empty_like(logits)

    def limit() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if top_k is not None:
            copy.copy_(logits)

    return Workload(
        name=name,
        shape=f"T={T} D={D} V={V}",
        dtype=dtype,
        ours=lambda impl: token_stats(hidden, weight, labels, statistics=statistics, top_k=top_k, impl=impl),
        implementations=forms() if top_k is None else tuple(form for form in forms() if form != "fused"),
        limit=limit,
        peers=eager_peers(eager, gives, *operands) | others,
        check=lambda out: check_head(out, *operands, statistics, top_k),
    )


def scored_rows(T: int, D: int, V: int, dtype: torch.dtype) -> Workload:
    """The head on every second row of twice as many hidden states; eager torch has to copy them out."""
    hidden, weight, labels = operands = inputs(T, D, V, dtype, generator(0))
    rows = torch.arange(1, 2 * T, 2, device=DEVICE)
    packed = torch.zeros(2 * T, D, dtype=dtype, device=DEVICE).index_copy_(0, rows, hidden)
    logits = torch.empty(T, V, dtype=dtype, device=DEVICE)
    return Workload(
        name=ROWS,
        shape=f"T={T} D={D} V={V}",
        dtype=dtype,
        ours=lambda impl: token_stats(packed, weight, labels, rows=rows, impl=impl),
        implementations=forms(),
        limit=lambda: torch.mm(hidden, weight.T, out=logits),
        peers={"eager in chunks (all four)": lambda: in_chunks(eager_exact, packed[rows], weight, labels, CHUNK)},
        check=lambda out: check_head(out, *operands),
    )


def from_logits(T: int, V: int, dtype: torch.dtype) -> Workload:
    """The statistics of logits that exist. The limit, one read of them, is taken as half of a copy."""
    g = generator(0)
    logits = (3.0 * torch.randn(T, V, generator=g, device=DEVICE)).to(dtype)
    labels = torch.randint(0, V, (T,), generator=g, device=DEVICE)
    labels[::2] = logits[::2].argmax(1)
    copy = torch.empty_like(logits)
    some = slice(None, None, max(1, T // CHECKED_ROWS))

    def check(out: TokenStats) -> None:
        part, label = logits[some], labels[some]
        truth = token_stats_from_logits_naive(part, label)
        assert_right(pick(out, some), truth, part, label, torch.float32)  # both start from the same logits

    peers = {"eager (all four)": lambda: eager_exact(logits, labels)}
    if compiles():
        compiled = torch.compile(eager_exact, dynamic=False)
        peers["torch.compile of eager (all four)"] = lambda: compiled(logits, labels)
    peers["torch's cross_entropy (nll only)"] = lambda: F.cross_entropy(logits, labels, reduction="none")
    return Workload(
        name=FROM_LOGITS,
        shape=f"T={T} V={V}",
        dtype=dtype,
        ours=lambda impl: token_stats_from_logits(logits, labels, impl=impl),
        implementations=("triton", "torch") if CUDA and has_triton() else ("torch",),
        limit=lambda: copy.copy_(logits),
        limit_scale=0.5,
        peers=peers,
        check=check,
    )


def eager_peers(statistics: Callable, gives: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> Mapping[str, Run]:
    """``statistics(logits, labels)`` at once, in chunks and compiled."""
    peers = {
        f"eager ({gives})": lambda: statistics(hidden @ weight.T, labels),
        f"eager in chunks ({gives})": lambda: in_chunks(statistics, hidden, weight, labels, CHUNK),
    }
    if compiles():
        compiled = torch.compile(lambda h, w, y: statistics(h @ w.T, y), dynamic=False)
        peers[f"torch.compile of eager ({gives})"] = lambda: compiled(hidden, weight, labels)
    return peers


def reference_peer(hidden: Tensor, weight: Tensor, labels: Tensor) -> Mapping[str, Run]:
    """What LARK's released scorer does with the logits."""
    return {"eager, softmax and topk (nll, top-k Brier)": lambda: eager_topk(hidden @ weight.T, labels, TOP_K)}


def nll_peers(hidden: Tensor, weight: Tensor, labels: Tensor) -> Mapping[str, Run]:
    """Linear cross entropies, forward only; those that need CUDA are among them where it is."""
    peers = {}
    if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
        torch_loss = partial(F.linear_cross_entropy, hidden, weight, labels, reduction="none")
        peers["torch's linear_cross_entropy (nll only)"] = torch_loss
        if CUDA:  # it makes the gradients too, which takes a CPU ten times as long
            options = torch.nn.LinearCrossEntropyOptions()
            peers["torch's linear_cross_entropy in chunks (nll only)"] = partial(torch_loss, options=options)
    else:
        note_missing("torch's linear_cross_entropy (torch 2.13 has it)")
    if liger := optional_peer("liger_kernel.transformers.fused_linear_cross_entropy", needs_cuda=True):
        loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="none")
        peers["Liger (nll only)"] = lambda: loss(weight, hidden, labels)
    if cce := optional_peer("cut_cross_entropy", needs_cuda=True):
        peers["cut-cross-entropy (nll only)"] = lambda: cce.linear_cross_entropy(
            hidden, weight, labels, reduction="none"
        )
    return peers


def compiles() -> bool:
    """Whether torch.compile has what it needs: Triton on a GPU, a C++ compiler on a CPU."""
    found = has_triton() if CUDA else shutil.which("c++") is not None
    if not found:
        note_missing("torch.compile (no compiler)")
    return found


def check_head(
    out: TokenStats, hidden: Tensor, weight: Tensor, labels: Tensor, statistics=STATISTICS, top_k: int | None = None
) -> None:
    """Fails where some rows of ``out`` are further from float64 than they may be."""
    some = slice(None, None, max(1, len(labels) // CHECKED_ROWS))
    part, label = hidden[some], labels[some]
    truth = token_stats_naive(part, weight, label, statistics=statistics, top_k=top_k)
    assert_right(pick(out, some), truth, part @ weight.T, label, hidden.dtype, top_k)


def pick(stats: TokenStats, tokens: slice | Tensor) -> TokenStats:
    """Statistics of some of the tokens."""
    return stats.map(lambda values: values[tokens])
