"""How a benchmark is taken: ours, its limit and its peers in turn, in one run, and ratios are what is kept.

The limit is the least work that the operation cannot do without: its matrix products, or the copy of its operands.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from benchmarks.baselines import complaint
from lark_fast.flop import square_product

Run = Callable[[], Any]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A ratio is as good as the quietest moment that each of its two sides had: ours and the limit need many short rounds,
# peers, which nobody judges, a few.
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 40, 6.0
MIN_PEER_ROUNDS, PEER_SECONDS = 2, 4.0
MAX_LIMIT_CALLS = 20  # of a limit that is much shorter than ours, in a round: as much time for the one as for the other

# What looks worse than its baseline gets more turns before it is judged: noise only adds, so more rounds only sharpen.
MORE_TURNS = 4

missing_peers: list[str] = []
known_ratios: dict[str, float] = {}  # baselines, by ``baseline_key``; conftest.py fills it in


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One operation on one set of operands, and all that a benchmark of it needs."""

    name: str  # of the operation
    shape: str
    dtype: torch.dtype  # of the operands
    ours: Callable[[str], Any]  # the operation, by implementation or "auto"
    implementations: tuple[str, ...]  # those that can be timed on this device
    limit: Run  # what bounds it
    limit_scale: float = 1.0  # the work of the operation over the work of ``limit``
    peers: Mapping[str, Run] = field(default_factory=dict)  # other ways, and in brackets what they give
    check: Callable[[Any], None]  # fails if what came of ``ours`` is wrong
    tokens: int | None = None  # that the operation passes over, where its speed is told in tokens


def compare_workload(benchmark: Any, workload: Workload) -> None:
    """``compare`` what "auto" picks."""
    compare(
        benchmark,
        workload.name,
        lambda: workload.ours("auto"),
        limit=workload.limit,
        limit_scale=workload.limit_scale,
        peers=workload.peers,
        check=lambda results: workload.check(results["ours"]),
        shape=workload.shape,
        dtype=str(workload.dtype).removeprefix("torch."),
    )


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

    Every round holds ours and the limit, for about as long, and the first rounds one call of each peer; a ratio is the
    shortest time of one over the shortest of the other, for other work on the machine only ever adds to a time.

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
    check({run: call() for run, call in {"ours": ours, **peers}.items()})
    limit()
    own_seconds, one_limit = _seconds(ours), _seconds(limit)
    limit_calls = _rounds(one_limit, own_seconds, 1, MAX_LIMIT_CALLS)
    rounds = _rounds(own_seconds + limit_calls * one_limit, SECONDS, MIN_ROUNDS, MAX_ROUNDS)
    peer_rounds = _rounds(sum(map(_seconds, peers.values())), PEER_SECONDS, MIN_PEER_ROUNDS, rounds)
    limit_seconds: list[float] = []  # limit_calls a round
    peer_seconds: dict[str, list[float]] = {peer: [] for peer in peers}

    def time_others() -> None:
        if len(limit_seconds) < peer_rounds * limit_calls:
            for peer, samples in peer_seconds.items():
                samples.append(_seconds(peers[peer]))
        limit_seconds.extend(_seconds(limit) for _ in range(limit_calls))

    benchmark.pedantic(_synchronised(ours), setup=time_others, rounds=rounds)
    info = benchmark.extra_info
    info.update(name=name, shape=shape, dtype=dtype, device=DEVICE.type)
    if benchmark.stats is None:  # --benchmark-disable: nothing was timed
        return
    best = benchmark.stats.stats.min
    baseline = known_ratios.get(baseline_key(info))
    for turn in range(1 + MORE_TURNS):
        if turn:
            for _ in range(rounds):
                limit_seconds.extend(_seconds(limit) for _ in range(limit_calls))
                best = min(best, _seconds(ours))
        ratio = best / min(limit_seconds) / limit_scale
        if baseline is None or complaint(ratio, baseline, DEVICE.type) is None:
            break
    if baseline is not None:
        info["baseline"] = baseline
    info.update(ratio_to_limit=ratio, speedup={peer: min(samples) / best for peer, samples in peer_seconds.items()})


def baseline_key(info: Mapping[str, Any]) -> str:
    """Under which the ratio of a benchmark is kept."""
    return f"{info['name']}; {info['shape']}; {info['dtype']}"


def optional_peer(module: str, needs_cuda: bool = False) -> ModuleType | None:
    """A package that not everybody has; the end of the run names those that were missing."""
    if needs_cuda and DEVICE.type != "cuda":
        note_missing(f"{module.partition('.')[0]} (needs CUDA)")
        return None
    if find_spec(module.partition(".")[0]) is None:
        note_missing(f"{module.partition('.')[0]} (not installed)")
        return None
    try:
        return import_module(module)
    except Exception as error:  # it is here and does not work with what else is
        note_missing(f"{module.partition('.')[0]} ({type(error).__name__}: {error})"[:200])
        return None


def note_missing(peer: str) -> None:
    """Have the end of the run name a peer that could not be taken."""
    if peer not in missing_peers:
        missing_peers.append(peer)


def ceiling(dtype: torch.dtype) -> tuple[Run, float]:
    """A square matrix product that runs as fast as the machine can, and its 2 n^3 FLOP."""
    return square_product(DEVICE, dtype)


def _rounds(seconds: float, budget: float, least: int, most: int) -> int:
    return max(least, min(most, int(budget / max(seconds, 1e-9))))


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
