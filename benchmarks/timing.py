"""Times, memory and registers of a run, as the device itself tells them."""

import ctypes
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import DEVICE, Run
from benchmarks.fingerprint import KERNELS

CUDA = DEVICE.type == "cuda"
BUSY_CYCLES = 2_000_000  # of the GPU's clock: about a millisecond
MIN_ROUNDS, MAX_ROUNDS = (8, 30) if CUDA else (3, 30)


def take_turns(runs: Mapping[str, Run], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every round of every run, all of them in turn in each round, after a round that warms up.

    Args:
        runs: by name; those that compile have run before.
        seconds: that the rounds may take together, where that leaves MIN_ROUNDS.
    """
    clock = _cuda_clock() if CUDA else _cpu_milliseconds
    started = time.perf_counter()
    for run in runs.values():
        clock(run)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / (time.perf_counter() - started))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        # Another one begins each round: whoever follows a run that heats or cools the chip is not always the same.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(clock(runs[name]))
    return samples


def _cuda_clock() -> Any:
    """Between two events on the stream, the L2 cache full of something else.

    The stream is kept busy while the launches of ``run`` are being queued, so what counts is what the GPU does; a run
    that waits for the GPU on the way, as ``token_stats`` does without ``rows``, shows what its wait costs.
    """
    flush = torch.empty(4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size, dtype=torch.uint8, device=DEVICE)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds(run: Run) -> float:
        torch.cuda.synchronize()
        flush.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return milliseconds


def _cpu_milliseconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def extra_memory_mib(run: Run) -> float | None:
    """How far memory rises over what is there before ``run``, which has run before; None where nobody counts it."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        return None
    # What the allocator keeps of earlier runs would hide this one's memory. Not ru_maxrss: Linux starts a child's at
    # its parent's peak, and making the operands has a peak of its own.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    peak.write_text("5")
    before = _resident_mib("VmRSS")
    run()
    return max(0.0, _resident_mib("VmHWM") - before)


def peak_memory_mib() -> float | None:
    """All that was on the GPU at the height of the run that ``extra_memory_mib`` has just watched."""
    return torch.cuda.max_memory_allocated() / 2**20 if CUDA else None


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def compiled_kernels() -> list[dict]:
    """Registers, spills and shared memory of every Triton kernel of ours that has run in this process."""
    entries = []
    for path in sorted(KERNELS.glob("*_triton.py")):
        module = sys.modules.get(f"lark_fast.kernels.{path.stem}")
        for function in vars(module).values() if module else ():
            if getattr(function, "__module__", None) == module.__name__:
                entries += map(_compiled, _variants(function))
    return entries


def _variants(function: Any) -> Iterator[Any]:
    """What Triton has compiled a jit function to: (kernels by key, ...) by device, in Triton 3.6 to 3.9."""
    for caches in list(getattr(function, "device_caches", {}).values()):
        for kernel in caches[0].values():
            yield kernel.result() if hasattr(kernel, "result") else kernel


def _compiled(kernel: Any) -> dict:
    kernel.run  # noqa: B018  a kernel is loaded, and its registers are counted, when its launcher is first asked for
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    return {
        "name": kernel.name,
        "registers": getattr(kernel, "n_regs", None),  # None: it takes more than this GPU has, and did not run
        "spills": getattr(kernel, "n_spills", None),
        "shared_bytes": kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
        "num_stages": kernel.metadata.num_stages,
        "constants": {name: value for name, value in constants.items() if isinstance(value, int | float | str | None)},
    }
