"""``linear_cross_entropy``, forward and backward, as it is benchmarked: shapes, peers, limit, truth and budgets.

FLOP of the limit: 3 x 2 T D V (logits, gradient of hidden, gradient of weight). Bytes that stay: the two gradients.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import head
from benchmarks.accuracy import CONFIDENT, FLOORS, ROUNDING
from benchmarks.comparison import DEVICE, Run, Workload, note_missing, optional_peer
from lark_fast.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_naive

NAME = "linear cross entropy, forward + backward"
CUDA = DEVICE.type == "cuda"
if CUDA:  # Qwen2.5-7B, and a small model of a large vocabulary
    SHAPES = [(16384, 3584, 152064, torch.bfloat16), (16384, 2048, 248320, torch.bfloat16)]
else:
    SHAPES = [(512, 256, 8192, torch.float32), (256, 256, 151936, torch.float32)]
TRUE_LOGITS = 100_000_000  # of the float64 definition at one time
RESULTS = ("loss", "hidden", "weight", "bias")  # the loss, and the gradients
# Roundings to the dtype of the operands that a gradient cannot do without: its own, and on tensor cores its operands'.
ROUNDINGS = {torch.float32: 0.0, torch.float16: 2.0**-12, torch.bfloat16: 2 * 2.0**-9}
TINY = 2.0**-25  # half of fp16's smallest step, by which a confident token's gradient can be off there

Gradients = tuple[Tensor, ...]  # loss, and the gradients of what was differentiated


def with_gradients(loss, *tensors: Tensor) -> Gradients:
    """``loss(*tensors)`` and its gradients."""
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        value = loss(*tensors)
        return value.detach(), *torch.autograd.grad(value, tensors)


def in_blocks(loss, rows: int, hidden: Tensor, labels: Tensor, token_weights: Tensor, *others: Tensor) -> Gradients:
    """``with_gradients`` of ``loss(hidden, *others, labels=, token_weights=)``, rows by rows and summed in float64."""
    total, of_hidden, of_others = 0.0, [], [torch.zeros_like(tensor, dtype=torch.float64) for tensor in others]
    for part, label, c in zip(hidden.split(rows), labels.split(rows), token_weights.split(rows), strict=True):
        value, own, *rest = with_gradients(partial(loss, labels=label, token_weights=c), part, *others)
        total = total + value.double()
        of_hidden.append(own)
        for tensor, gradient in zip(of_others, rest, strict=True):
            tensor += gradient
    return total, torch.cat(of_hidden), *of_others


def truth(hidden: Tensor, labels: Tensor, token_weights: Tensor, *others: Tensor, **head_options) -> Gradients:
    """The definition in float64."""
    exact = [tensor.double() for tensor in (hidden, token_weights, *others)]

    def loss(hidden, weight, bias=None, *, labels, token_weights):
        return linear_cross_entropy_naive(hidden, weight, labels, token_weights, bias=bias, **head_options)

    return in_blocks(loss, max(1, TRUE_LOGITS // len(others[0])), exact[0], labels, *exact[1:])


def eager_gradients(
    hidden: Tensor, labels: Tensor, token_weights: Tensor, *others: Tensor, softcap=None, logit_scale=1.0
) -> Gradients:
    """What a model and torch's cross entropy make in the dtype of the operands."""

    def loss(hidden, weight, bias=None, *, labels, token_weights):
        logits = F.linear(hidden, weight, bias) * logit_scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return (F.cross_entropy(logits.float(), labels, reduction="none") * token_weights).sum()

    return in_blocks(loss, max(1, TRUE_LOGITS // len(others[0])), hidden, labels, token_weights, *others)


def judge(
    out: Gradients, exact: Gradients, eager: Gradients, largest_logit: float, confident: Tensor, dtype: torch.dtype
) -> list[dict]:
    """One entry a result: norm ratio and largest error, the gradient of hidden also over ``confident`` rows alone.

    Budgets: a tenth of eager torch's error in bf16 and fp16, twice it in float32; but none is below what the roundings
    of ``ROUNDINGS`` and float32 sums of such logits leave.
    """
    share = 2.0 if dtype == torch.float32 else 0.1
    entries = []
    for name, value, true, peer in zip(RESULTS, out, exact, eager, strict=False):
        rounding = 0.0 if name == "loss" else ROUNDINGS[dtype]
        tiny = TINY if name != "loss" and dtype == torch.float16 else 0.0
        entry = {"statistic": name, "ok": bool(value.isfinite().all())}
        entries.append(entry)
        parts = {"error": slice(None), "largest_error": slice(None)}
        if name == "hidden":
            parts["confident_error"] = confident
        for error, rows in parts.items():
            a, t, e = (tensor.double().reshape(len(tensor) if tensor.ndim else 1, -1) for tensor in (value, true, peer))
            a, t, e = a[rows], t[rows], e[rows]
            logit_roundings, sums = FLOORS[error]
            floor = logit_roundings * ROUNDING * largest_logit + sums + rounding
            if not t.numel():
                continue
            if error == "largest_error":
                own, theirs, floor = (a - t).abs().max(), (e - t).abs().max(), 2 * floor * t.abs().max().item() + tiny
            else:
                own, theirs = ((x - t).norm() / t.norm() for x in (a, e))
                floor += tiny * math.sqrt(t.numel()) / t.norm().item()
            budget = max(floor, share * theirs.item())
            entry |= {error: own.item(), "budget" if error == "error" else error.replace("_error", "_budget"): budget}
            entry["ok"] &= own.item() <= budget
    return entries


def assert_right(out: Gradients, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Fails where the mean loss or its gradients are further from float64 than they may be."""
    c = torch.full((len(labels),), 1.0 / len(labels), device=DEVICE)
    operands = hidden, labels, c, weight
    largest, confident = about_logits(hidden, weight, labels)
    entries = judge(out, truth(*operands), eager_gradients(*operands), largest, confident, hidden.dtype)
    wrong = [entry for entry in entries if not entry["ok"]]
    assert not wrong, wrong


def about_logits(hidden: Tensor, weight: Tensor, labels: Tensor, bias=None, softcap=None, logit_scale=None):
    """The largest |logit| before cap, and which rows are confident of their label."""
    largest, confident = 0.0, []
    for part, label in zip(hidden.split(1024), labels.split(1024), strict=True):
        x = part.float() @ weight.float().T
        x = (x if bias is None else x + bias) * (1.0 if logit_scale is None else logit_scale)
        largest = max(largest, x.abs().max().item())
        z = x if softcap is None else softcap * torch.tanh(x / softcap)
        confident.append(F.cross_entropy(z, label, reduction="none") < CONFIDENT)
    return largest, torch.cat(confident)


def workload(T: int, D: int, V: int, dtype: torch.dtype) -> Workload:
    """Mean loss and the gradients of hidden and weight."""
    hidden, weight, labels = head.inputs(T, D, V, dtype, head.generator(0))

    def limit() -> None:
        logits = hidden @ weight.T
        _ = logits @ weight, logits.T @ hidden

    def ours(impl: str) -> Gradients:
        return with_gradients(lambda h, w: linear_cross_entropy(h, w, labels, impl=impl), hidden, weight)

    return Workload(
        name=NAME,
        shape=f"T={T} D={D} V={V}",
        dtype=dtype,
        ours=ours,
        implementations=head.forms(),
        limit=limit,
        peers={name: partial(with_gradients, loss, hidden, weight) for name, loss in peers(labels).items()},
        check=partial(assert_right, hidden=hidden, weight=weight, labels=labels),
    )


def peers(labels: Tensor) -> Mapping[str, Run]:
    """Other mean losses of (hidden, weight); those that need CUDA are among them where it is."""

    def eager(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.T).float(), labels)

    found = {"eager": eager}
    if head.compiles():
        found["torch.compile of eager"] = torch.compile(eager, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
        found["torch's linear_cross_entropy"] = lambda h, w: F.linear_cross_entropy(h, w, labels)
        if CUDA:
            options = torch.nn.LinearCrossEntropyOptions()
            found["torch's linear_cross_entropy in chunks"] = lambda h, w: F.linear_cross_entropy(
                h, w, labels, options=options
            )
    else:
        note_missing("torch's linear_cross_entropy (torch 2.13 has it)")
    if liger := optional_peer("liger_kernel.transformers.fused_linear_cross_entropy", needs_cuda=True):
        for name, sums in (("Liger", None), ("Liger, float32 sums", torch.float32)):
            fused = liger.LigerFusedLinearCrossEntropyLoss(accum_dtype=sums)
            found[name] = lambda h, w, fused=fused: fused(w, h, labels)
    if cce := optional_peer("cut_cross_entropy", needs_cuda=True):
        for name, filtered in (("cut-cross-entropy", "auto"), ("cut-cross-entropy, exact", None)):
            found[name] = partial(_cut, cce, labels, filtered)
    return found


def _cut(cce, labels: Tensor, filtered: str | None, h: Tensor, w: Tensor) -> Tensor:
    return cce.linear_cross_entropy(h, w, labels, filter_eps=filtered)
