"""``python -m benchmarks.record --tune``: every candidate of dispatch.py for this GPU, at the shapes that matter.

The first candidate of a table is the one in use: put the fastest there.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from statistics import median
from types import ModuleType
from typing import Any

import torch

from benchmarks import head, loss, timing
from benchmarks.baselines import device_name, versions
from benchmarks.comparison import DEVICE, Run
from benchmarks.correctness import interpreted
from lark_fast.kernels import dispatch

SECONDS = 10.0  # of the rounds of one shape
CHUNK_MIB = (16, 32, 64, 128)  # of float32 logits that the chunked form makes at a time
LOSS_BLOCK_MIB = (512, 1024, 2048, 4096)  # of the loss's chunked form
LOSS_CHUNK_MIB = (64, 128, 256)  # of errors that its fused form makes at a time


@torch.no_grad()
def tune(tiny: bool) -> int:
    """Print a line a candidate, the fastest first; 1 where this machine has nothing to tune."""
    if DEVICE.type != "cuda" and not interpreted():
        print("--tune needs a GPU, or TRITON_INTERPRET=1 with --tiny for a trial of the path", file=sys.stderr)
        return 1
    print(f"{device_name()}; {versions()}")
    tiny_shapes = [(33, 48, 257, torch.bfloat16)] if tiny else None
    for tuned, shapes in ((_tune_head, tiny_shapes or head.SHAPES), (_tune_loss, tiny_shapes or loss.SHAPES)):
        for shape in shapes:
            try:
                tuned(*shape)
            except Exception as error:  # the other shape is worth as much
                print(f"{shape}: {type(error).__name__}: {error}", flush=True)
    for kernel in timing.compiled_kernels():
        print(kernel)
    return 0


def _tune_head(T: int, D: int, V: int, dtype: torch.dtype) -> None:
    hidden, weight, _ = operands = head.inputs(T, D, V, dtype, head.generator(0))
    logits = torch.empty(T, V, dtype=dtype, device=DEVICE)
    limit = partial(torch.mm, hidden, weight.T, out=logits)
    _rank(f"T={T} D={D} V={V} {dtype}", _candidates(*operands), limit, lambda out: head.check_head(out, *operands))


def _tune_loss(T: int, D: int, V: int, dtype: torch.dtype) -> None:
    workload = loss.workload(T, D, V, dtype)
    name = f"{workload.name}, {workload.shape} {dtype}"
    _rank(name, _loss_candidates(workload.ours), workload.limit, workload.check)


def _rank(shape: str, candidates: Iterator[tuple[str, Run]], limit: Run, check: Callable[[Any], None]) -> None:
    """Print the candidates that pass ``check``, the fastest first."""
    runs, refused = {}, {}
    for name, run in candidates:
        print(f"check {name}", flush=True)
        try:
            check(run())
            runs[name] = run
        except Exception as error:  # too few registers, too little shared memory, a wrong result: all are told
            refused[name] = f"{type(error).__name__}: {error}"[:200]
    seconds = SECONDS if DEVICE.type == "cuda" else 0.0
    samples = timing.take_turns({"limit": limit, **runs}, seconds)
    medians = {name: median(own) for name, own in samples.items()}
    limit_ms = medians.pop("limit")
    print(f"\n{shape}; the products alone: {limit_ms:.3f} ms")
    for name in sorted(medians, key=medians.get):
        memory = timing.extra_memory_mib(runs[name])
        print(f"{medians[name]:9.3f} ms  {medians[name] / limit_ms:6.3f}x  {memory or 0:8.0f} MiB  {name}")
    for name, reason in refused.items():
        print(f"  refused            {name}: {reason}")


def _loss_candidates(ours: Callable[[str], Any]) -> Iterator[tuple[str, Run]]:
    from lark_fast.kernels import linear_cross_entropy, linear_cross_entropy_triton

    def with_changed(module: ModuleType, changes: dict[str, Any], form: str) -> Any:
        before = {name: getattr(module, name) for name in changes}
        vars(module).update(changes)
        try:
            return ours(form)
        finally:
            vars(module).update(before)

    for mib in LOSS_BLOCK_MIB:
        changes = {"GPU_LOGITS": mib << 18}
        yield f"chunked, {mib} MiB", partial(with_changed, linear_cross_entropy, changes, "chunked")
    arch = dispatch.architecture(DEVICE) if DEVICE.type == "cuda" else None
    for config in dispatch.CONFIGS[arch] if arch else (dispatch.INTERPRETER_CONFIG,):
        words = ", ".join(f"{name}={value}" for name, value in asdict(config).items())
        for mib in LOSS_CHUNK_MIB:
            changes = {"CHUNK_BYTES": mib << 20, "head_config": lambda *_, config=config: config}
            yield f"fused, {mib} MiB, {words}", partial(with_changed, linear_cross_entropy_triton, changes, "fused")


def _candidates(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[str, Run]]:
    from lark_fast.kernels import logits_triton, softmax_sums_triton, token_stats_triton
    from lark_fast.kernels.head import Head
    from lark_fast.kernels.softmax_sums import TokenStats, Wanted

    whole, wanted = Head(weight), Wanted()

    def fused(config: dispatch.HeadConfig) -> TokenStats:
        label_logit = token_stats_triton.label_logits(hidden, None, whole, labels, config)
        partials = token_stats_triton.partial_sums(hidden, None, whole, labels, label_logit, wanted, config)
        return softmax_sums_triton.finish(partials, label_logit, wanted)

    def chunked(mib: int) -> TokenStats:
        before, logits_triton.CHUNK_BYTES = logits_triton.CHUNK_BYTES, mib << 20
        try:
            label_logit = token_stats_triton.label_logits(hidden, None, whole, labels)
            partials = logits_triton.chunked_partial_sums(hidden, None, whole, labels, label_logit, wanted)
            return softmax_sums_triton.finish(partials, label_logit, wanted)
        finally:
            logits_triton.CHUNK_BYTES = before

    arch = dispatch.architecture(DEVICE) if DEVICE.type == "cuda" else None
    for config in dispatch.CONFIGS[arch] if arch else (dispatch.INTERPRETER_CONFIG,):
        words = ", ".join(f"{name}={value}" for name, value in asdict(config).items())
        yield f"fused, {words}", partial(fused, config)
    for mib in CHUNK_MIB:
        yield f"chunked, {mib} MiB", partial(chunked, mib)
