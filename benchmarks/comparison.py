"""How a benchmark is taken: ours, its limit and its peers in turn, in one run, and ratios are what is kept.

The limit is the least work that the operation cannot do without: its matrix products, or the copy of its operands.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from types import ModuleType
from typing import Any

import torch

Run = Callable[[], Any]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIN_ROUNDS, MAX_ROUNDS = 2, 15
SECONDS = 10.0  # of one comparison, where that leaves MIN_ROUNDS

missing_peers: list[str] = []


def compare(
    benchmark: Any,
    name: str,
    ours: Run,
    *,
    limit: Run,
    limit_scale: float = 1.0,
    peers: Mapping[str, Run],
    check: Callable[[dict[str, Any]], None],
    shape: str,
    dtype: str,
) -> None:
    """Check, time all in turn, and store ``ratio_to_limit`` (1 is the best there is) and ``speedup`` over each peer.

    Every round holds one call of each, so whatever slows the machine down slows all of them; a ratio is the median of
    the rounds' own ratios.

    Args:
        benchmark: the fixture of pytest-benchmark.
        name: the operation.
        ours: what is judged.
        limit: what bounds it.
        limit_scale: the work of the operation over the work of ``limit``.
        peers: other ways to the same result.
        check: fails if what came of "ours" and of each peer, by name, is wrong: a wrong result has no time.
        shape: of the problem, for people.
        dtype: of the operands.
    """
    started = time.perf_counter()
    results = {run: call() for run, call in {"ours": ours, **peers}.items()}
    limit()
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS / (time.perf_counter() - started))))
    check(results)
    del results

    others = {"limit": limit, **peers}
    seconds: dict[str, list[float]] = {run: [] for run in others}

    def time_others() -> None:
        for run, samples in seconds.items():
            samples.append(_seconds(others[run]))

    benchmark.pedantic(_synchronised(ours), setup=time_others, rounds=rounds)
    benchmark.extra_info.update(name=name, shape=shape, dtype=dtype, device=DEVICE.type)
    if benchmark.stats is None:  # --benchmark-disable: nothing was timed
        return
    own = benchmark.stats.stats.data
    benchmark.extra_info.update(
        ratio_to_limit=_ratio(own, seconds.pop("limit")) / limit_scale,
        speedup={peer: _ratio(samples, own) for peer, samples in seconds.items()},
    )


def optional_peer(module: str) -> ModuleType | None:
    """A package that not everybody has; the end of the run names those that were missing."""
    if find_spec(module.partition(".")[0]) is None:
        if module not in missing_peers:
            missing_peers.append(module)
        return None
    return import_module(module)


def ceiling(dtype: torch.dtype) -> tuple[Run, float]:
    """A square matrix product that runs as fast as the machine can, and its 2 n^3 FLOP."""
    n = 8192 if DEVICE.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=DEVICE).to(dtype)
    return lambda: a @ b, 2.0 * n**3


def _seconds(run: Run) -> float:
    started = time.perf_counter()
    _synchronised(run)()
    return time.perf_counter() - started


def _synchronised(run: Run) -> Run:
    """``run``, over only when the device is done too."""

    def whole() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return whole


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return median(a / b for a, b in zip(numerators, denominators, strict=True))
