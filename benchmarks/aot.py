"""Compiles every kernel in every configuration that can be picked, for GPUs that need not be here, and reads what the
compiler says: registers, bytes spilled, and whether the matrix instructions of the chip are used.

    python -m benchmarks.aot [--arch sm_90 ...] [--first [sm_80 ...]]

A line of JSON a kernel; ``--first`` stops at the first configuration of each operation, for all or for some. The
launchers run as they are, on tensors without memory (torch's "meta" device), under a driver that stands for the GPU:
what is compiled is what is launched there.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends import DriverBase
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lark_fast.kernels import (
    chi2_triton,
    dispatch,
    fp8_triton,
    linear_cross_entropy_triton,
    logits_triton,
    softmax_sums_triton,
    token_stats_triton,
    topk_triton,
    trajectory_reduce_triton,
)
from lark_fast.kernels.chi2_tensors import LARGEST_K
from lark_fast.kernels.dispatch import HeadConfig
from lark_fast.kernels.head import Head
from lark_fast.kernels.softmax_sums import Wanted

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

T, V = 8192, 152064
ALL, CHEAP = Wanted(), Wanted(brier=True, entropy=False, rank=False)
NLL = linear_cross_entropy_triton.NLL
EVERYTHING = ("bias", "softcap", "logit_scale")
LOSS_WORDS = 4096  # whose errors the fused loss makes at a time


class AbsentGPU(DriverBase):
    """What Triton asks of a driver in order to compile."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> str:
        return self.arch  # only ever a key of Triton's caches

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[list]:
    """Launches compile for ``arch`` and do nothing else; the list fills with what was compiled."""
    compiled = []

    def compile_only(kernel: JITFunction, grid: tuple) -> Callable:
        return lambda *args, **kwargs: compiled.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

    launch = JITFunction.__getitem__
    JITFunction.__getitem__ = compile_only
    triton.runtime.driver.set_active(AbsentGPU(arch))
    try:
        yield compiled
    finally:
        JITFunction.__getitem__ = launch


class Launch(NamedTuple):
    operation: str
    configuration: str
    start: Callable[[], object]
    multiplies: bool = False  # half-precision matrices, so that the chip's matrix instructions are expected
    in_flight: int = 0  # bytes of operands that pipelined loads keep in shared memory, at least


def launches(arch: str) -> Iterator[Launch]:
    """All that can be picked on ``arch``."""
    for config in dispatch.CONFIGS[arch]:
        yield fused(config, torch.bfloat16, 3584, ALL, False, ())
        yield fused(config, torch.bfloat16, 896, CHEAP, True, ())
        yield fused(config, torch.float16, 3584, ALL, True, ())
        yield fused_label(config, torch.bfloat16, 3584)
        yield fused(config, torch.bfloat16, 3584, NLL, False, ())
        yield errors(config, torch.bfloat16, 3584, ())
    yield fused(dispatch.CONFIGS[arch][0], torch.bfloat16, 896, ALL, True, ())  # the scorer's own
    for extras in (("bias",), ("softcap",), ("logit_scale",), EVERYTHING):
        yield fused(dispatch.FINISHING_CONFIGS[arch], torch.bfloat16, 3584, ALL, True, extras)
        yield errors(dispatch.FINISHING_CONFIGS[arch], torch.bfloat16, 2048, extras)
    yield fused(dispatch.FINISHING_CONFIGS[arch], torch.bfloat16, 3584, NLL, False, EVERYTHING)
    for dtype in (torch.float32, torch.bfloat16):
        yield fused(dispatch.PLAIN_CONFIG, dtype, 1001, ALL, True, EVERYTHING)
        yield fused_label(dispatch.PLAIN_CONFIG, dtype, 1001)
        yield errors(dispatch.PLAIN_CONFIG, dtype, 1001, EVERYTHING)
        for extras in ((), EVERYTHING):
            yield from (errors_of_logits(dtype, words, extras) for words in (V, 50257))
    for wanted in (ALL, CHEAP, NLL):
        yield Launch(
            "finish", f"{wanted}", lambda wanted=wanted: softmax_sums_triton.finish(empty(33, 5, T), empty(T), wanted)
        )
        for dtype in (torch.float32, torch.bfloat16):
            # 50257 is no multiple of 16: its rows cannot be read in wide loads.
            yield from (from_logits(dtype, words, wanted) for words in (V, 50257))
    yield from (unfinished(chunked, wanted) for chunked in (True, False) for wanted in (ALL, NLL))
    for dtype in (torch.float32, torch.bfloat16):
        yield from (top_k(dtype, words, 50, False) for words in (V, 50257))
    yield top_k(torch.float32, V, 50, True)
    yield top_k(torch.float32, V, 1000, False)  # more than a program holds
    yield from (reduction(extras) for extras in (True, False))
    for columns, dtype in ((3584, torch.bfloat16), (18944, torch.bfloat16), (1001, torch.float32)):
        yield quantisation(columns, dtype, native=arch in ("sm_90", "sm_100"))
    yield selection(64, "exact", torch.float32, False)
    for form, extras in (("exact", True), ("reference", False), ("tau", True)):
        # 16 cells a thread, in float64 and with all that there is: more registers than any other takes.
        yield selection(LARGEST_K, form, torch.float64, extras)


def fused(
    config: HeadConfig, dtype: torch.dtype, D: int, wanted: Wanted, rows: bool, extras: tuple[str, ...]
) -> Launch:
    return Launch(
        "partial_sums",
        f"{config} {dtype} D={D} {wanted} rows={rows} {extras}",
        lambda: token_stats_triton.partial_sums(
            empty(T, D, dtype=dtype), whole(T) if rows else None, head(dtype, D, extras), whole(T), empty(T), wanted,
            config,
        ),
        dtype in dispatch.HALF,
        0 if config is dispatch.PLAIN_CONFIG else (config.num_stages - 1) * step_bytes(config, dtype),
    )  # fmt: skip


def fused_label(config: HeadConfig, dtype: torch.dtype, D: int) -> Launch:
    return Launch(
        "label_logits",
        f"{config} {dtype} D={D}",
        lambda: token_stats_triton.label_logits(empty(T, D, dtype=dtype), None, head(dtype, D), whole(T), config),
        dtype in dispatch.HALF,
    )


def errors(config: HeadConfig, dtype: torch.dtype, D: int, extras: tuple[str, ...]) -> Launch:
    """A chunk of the loss's errors, from logits made anew."""
    return Launch(
        "loss_errors",
        f"{config} {dtype} D={D} {extras}",
        lambda: linear_cross_entropy_triton.write_errors(
            empty(T, LOSS_WORDS, dtype=dtype), empty(T, D, dtype=dtype), head(dtype, D, extras), whole(T), empty(3, T),
            LOSS_WORDS, config,
        ),
        dtype in dispatch.HALF,
        0 if config is dispatch.PLAIN_CONFIG else (config.num_stages - 1) * step_bytes(config, dtype),
    )  # fmt: skip


def errors_of_logits(dtype: torch.dtype, words: int, extras: tuple[str, ...]) -> Launch:
    """The loss's errors in the memory of float32 logits; ``dtype`` is the operands'."""
    return Launch(
        "loss_errors_of_logits",
        f"{dtype} V={words} {extras}",
        lambda: linear_cross_entropy_triton.errors_of_logits(
            empty(T, words), head(dtype, 64, extras, words), whole(T), empty(3, T)
        ),
    )


def step_bytes(config: HeadConfig, dtype: torch.dtype) -> int:
    """Of the operands of one step of a tile's product."""
    return (config.rows + config.words) * config.inner * dtype.itemsize


def from_logits(dtype: torch.dtype, words: int, wanted: Wanted) -> Launch:
    return Launch(
        "logits_sums",
        f"{dtype} V={words} {wanted}",
        lambda: logits_triton.partial_sums(empty(T, words, dtype=dtype), whole(T), wanted),
    )


def unfinished(chunked: bool, wanted: Wanted) -> Launch:
    """Logits that still lack bias, cap and scale: a chunk of words, or all of them with the label's own among them."""
    words = head(torch.bfloat16, 64, EVERYTHING)
    rest = {"label_logit": empty(T), "first_column": 2048, "out": empty(1, 5, T)} if chunked else {}
    n = 1024 if chunked else V
    return Launch(
        "logits_sums",
        f"float32 V={n} {wanted} bias, cap, scale",
        lambda: logits_triton.partial_sums(empty(T, n), whole(T), wanted, head=words.columns(0, n), **rest),
    )


def top_k(dtype: torch.dtype, words: int, k: int, extras: bool) -> Launch:
    rest = {"bias": empty(words, dtype=torch.bfloat16), "softcap": 30.0, "logit_scale": 0.5} if extras else {}
    return Launch(
        "brier_topk",
        f"{dtype} V={words} k={k} bias, cap, scale={extras}",
        lambda: topk_triton.brier_topk(empty(T, words, dtype=dtype), whole(T), k, **rest),
    )


def reduction(extras: bool) -> Launch:
    fields = [empty(T), *((empty(T), empty(T), whole(T)) if extras else (None,) * 3), empty(T, dtype=torch.bool)]
    fields.append(empty(T) if extras else None)
    rest = (whole(T), empty(T)) if extras else (None, None)
    return Launch(
        "trajectory_reduce",
        f"all fields, rows, nll_before={extras}",
        lambda: trajectory_reduce_triton.reduce_on_device(fields, whole(65), *rest, 100),
    )


def quantisation(columns: int, dtype: torch.dtype, native: bool) -> Launch:
    """Rows in FP8; native: rounded by the chip's own instruction."""
    return Launch(
        "quantise_rows",
        f"{dtype} K={columns} native={native}",
        lambda: fp8_triton.quantise_on_device(empty(T, columns, dtype=dtype), native),
    )


def selection(size: int, form: str, dtype: torch.dtype, extras: bool) -> Launch:
    """The selection weights; extras: a prior, and problems of many sizes with a number each."""
    n = 1000
    energies = empty(n * size, dtype=dtype) if extras else empty(n, size - 1, dtype=dtype)
    out = empty(*energies.shape, dtype=dtype), whole(n), empty(4, n, dtype=torch.float64)
    settings = empty(n if extras else 1, dtype=torch.float64 if form == "tau" else torch.int64)
    rest = {"offsets": whole(n + 1), "order": whole(n)} if extras else {}
    prior = empty(n * size, dtype=dtype) if extras else None
    return Launch(
        "chi2_solve",
        f"K<={size} {form} {dtype} prior, offsets={extras}",
        lambda: chi2_triton.launch(form, size, energies, prior, settings, out, **rest),
    )


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def whole(n: int) -> torch.Tensor:
    return empty(n, dtype=torch.int64)


def head(dtype: torch.dtype, D: int, extras: tuple[str, ...] = (), words: int = V) -> Head:
    values = {"bias": empty(words, dtype=dtype), "softcap": 30.0, "logit_scale": 0.5}
    return Head(empty(words, D, dtype=dtype), **{name: values[name] for name in extras})


def report(arch: str, launch: Launch, kernel: Any) -> dict[str, Any]:
    """What the compiler said of a compiled kernel."""
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{word}:\s*(\d+)", text)[1]) for word in ("count", "spill_count"))
    else:
        text = kernel.asm["ptx"]
        registers, spilled = resources(kernel.asm["cubin"])
    return {
        "arch": arch,
        "operation": launch.operation,
        "kernel": kernel.metadata.name,
        "configuration": launch.configuration,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": kernel.metadata.shared,
        "shared_least": launch.in_flight,
        "shared_limit": SHARED_BYTES[arch],
        "multiplies": launch.multiplies,
        "matrix_instructions": MATRIX_INSTRUCTIONS[arch] in text,
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of its stack, where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed.stdout)
    return int(found[1]), int(found[2])


def faults(report: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    if report["spilled_bytes"]:
        found.append(f"{report['spilled_bytes']} bytes of registers spilled")
    if report["shared_bytes"] > report["shared_limit"]:
        found.append("more shared memory than the chip has")
    if report["shared_bytes"] < report["shared_least"]:
        found.append("the loads are not pipelined")
    if report["multiplies"] and not report["matrix_instructions"]:
        found.append("the matrix units are idle")
    return found


def main() -> int:
    """Exit status: 1 where a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=TARGETS, help="default: all")
    parser.add_argument(
        "--first", nargs="*", choices=TARGETS, help="one configuration of each operation; for these, default: for all"
    )
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, so nothing would be compiled: unset it")
    n_kernels = n_faulty = 0
    firsts = () if arguments.first is None else arguments.first or TARGETS
    for arch in arguments.arch or TARGETS:
        seen = set()
        with compiling_for(arch) as compiled:
            for launch in launches(arch):
                if arch in firsts and launch.operation in seen:
                    continue
                seen.add(launch.operation)
                compiled.clear()
                launch.start()
                for kernel in {id(kernel): kernel for kernel in compiled}.values():
                    told = report(arch, launch, kernel)
                    told["faults"] = faults(told)
                    n_kernels += 1
                    n_faulty += bool(told["faults"])
                    print(json.dumps(told), flush=True)
    print(f"{n_kernels} kernels compiled, {n_faulty} with faults", file=sys.stderr)
    return int(n_faulty > 0)


if __name__ == "__main__":
    sys.exit(main())
