"""``trajectory_reduce`` as it is benchmarked: token statistics of packed trajectories, and a loop over them.

Bytes of the limit, a copy of the inputs: 2 x 21 a token (three float32, an int64 and a bool, read and written).
"""

import numpy as np
import torch

from benchmarks.comparison import DEVICE, Workload
from benchmarks.workload import short_answers
from lark_fast.kernels.dispatch import has_triton
from lark_fast.kernels.softmax_sums import TokenStats
from lark_fast.kernels.trajectory_reduce import TrajectoryReduction, trajectory_reduce

NAME = "trajectory_reduce"
CUDA = DEVICE.type == "cuda"
TRAJECTORIES = 100_000 if CUDA else 20_000  # of 97 tokens in the mean: 204 and 41 MB, more than caches hold
FIELDS = ("nll", "brier", "entropy", "rank", "agreement")
MAX_RANK = 100


def inputs(n: int, seed: int) -> tuple[TokenStats, torch.Tensor]:
    """Statistics of the tokens of n trajectories as long as real answers, and where each starts and ends."""
    lengths = torch.from_numpy(short_answers(n)[1])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    T, g = int(lengths.sum()), torch.Generator(DEVICE).manual_seed(seed)
    nll = torch.empty(T, device=DEVICE).exponential_(generator=g)
    rank = nll.mul(5).exp().clamp(max=1e5).long()
    return TokenStats(nll, 1.0 - torch.exp(-nll), 2.0 * nll, rank, rank == 1), starts


def reduction(n: int = TRAJECTORIES) -> Workload:
    """Sums and means of five statistics."""
    stats, starts = inputs(n, 0)
    columns = [getattr(stats, name) for name in FIELDS]
    copies = [torch.empty_like(column) for column in columns]
    lengths = starts.diff().tolist()
    trajectory = torch.arange(n, device=DEVICE).repeat_interleave(starts.diff())

    def limit() -> None:
        for copy, column in zip(copies, columns, strict=True):
            copy.copy_(column)

    def loop() -> list[torch.Tensor]:
        return [torch.stack([part.double().sum() for part in column.split(lengths)]) for column in columns]

    def index_add() -> list[torch.Tensor]:
        sums = torch.zeros(len(columns), n, dtype=torch.float64, device=DEVICE)
        return [own.index_add_(0, trajectory, x.double()) for own, x in zip(sums, columns, strict=True)]

    peers = {"index_add (sums only)": index_add}
    if not CUDA:  # half a million launches take seconds there
        peers["a loop over trajectories (sums only)"] = loop
    return Workload(
        name=NAME,
        shape=f"N={n} T={len(trajectory)}",
        dtype=torch.float32,
        ours=lambda impl: trajectory_reduce(stats, starts, max_rank=MAX_RANK, impl=impl),
        implementations=("triton", "torch") if CUDA and has_triton() else ("torch",),
        limit=limit,
        peers=peers,
        check=lambda out: check(out, stats, starts),
    )


def check(out: TrajectoryReduction, stats: TokenStats, starts: torch.Tensor) -> None:
    """Fails where a sum or mean is not numpy's in float64."""
    assert not [entry for entry in errors(out, stats, starts) if not entry["ok"]]


def errors(out: TrajectoryReduction, stats: TokenStats, starts: torch.Tensor) -> list[dict]:
    """Errors of every sum and mean against numpy's in float64; float64 sums of a few thousand tokens are that good."""
    ends = starts.cpu().numpy()
    entries = []
    for name in FIELDS:
        values = getattr(stats, name).cpu().numpy().astype(np.float64)
        values = np.minimum(values, MAX_RANK) if name == "rank" else values
        sums = np.add.reduceat(values, ends[:-1])
        for kind, exact in (("sum", sums), ("mean", sums / np.diff(ends))):
            difference = getattr(getattr(out, f"{kind}s"), name).cpu().numpy() - exact
            error = float(np.linalg.norm(difference) / np.linalg.norm(exact))
            entries.append(
                {
                    "statistic": f"{kind} of {name}",
                    "error": error,
                    "largest_error": float(np.abs(difference).max()),
                    "budget": 1e-13,
                    "ok": error <= 1e-13,
                }
            )
    return entries
