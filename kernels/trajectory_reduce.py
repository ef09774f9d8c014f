"""Per-trajectory sums and means of per-token statistics, and the loss delta, in one launch.

For the tokens t of one trajectory, n of them:

    sum(x)     = sum_t x_t,   mean(x) = sum(x) / n     (float64)
    rank       = sum_t min(rank_t, max_rank)
    agreement  = sum_t [the label is a most probable token]
    loss_delta = sum_t (nll_before_t - nll_t)          (> 0 where the student got better)
    rsr        = rank / max(nll, 1e-12)                (Rank-Surprisal Ratio, arXiv 2601.14249; of the sums)

Trajectories lie one behind another, as the tokens of a packed batch do. Where their statistics were computed in another
order, ``rows`` says where each token's are, and they are read from there: no reordered copy is made.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lark_fast.kernels.dispatch import kernel_form
from lark_fast.kernels.softmax_sums import TokenStats

MAX_RANK = 100  # ranks beyond it count as it (arXiv 2601.14249)
SMALLEST_NLL = 1e-12  # sum of nll below which rsr does not divide
TOKEN_FIELDS = ("nll", "brier", "entropy", "rank", "agreement", "brier_topk")


@dataclass(frozen=True, slots=True)
class TrajectoryValues:
    """One number a trajectory and statistic: each field is ``[N]`` float64, or None where its input was not given."""

    nll: Tensor
    brier: Tensor | None
    entropy: Tensor | None
    rank: Tensor | None  # ranks beyond max_rank count as it
    agreement: Tensor | None
    brier_topk: Tensor | None
    loss_delta: Tensor | None


@dataclass(frozen=True, slots=True)
class TrajectoryReduction:
    """Statistics of N trajectories. One of no tokens has sums of 0, and NaN for its means and rsr.

    A token whose nll is NaN (ignored, or with broken logits) makes all numbers of its trajectory NaN, and no other's.
    """

    n_tokens: Tensor  # [N] int64
    sums: TrajectoryValues
    means: TrajectoryValues
    rsr: Tensor | None  # [N] float64; None where stats has no rank


def trajectory_reduce(
    stats: TokenStats,
    cu_seqlens: Tensor,
    *,
    rows: Tensor | None = None,
    nll_before: Tensor | None = None,
    max_rank: int = MAX_RANK,
    impl: str = "auto",
) -> TrajectoryReduction:
    """Sums and means over trajectories of every statistic in ``stats``, in float64.

    Ignored tokens, whose statistics are NaN, must be no part of a trajectory: leave them out with ``rows``.

    Nothing is copied to the host and nothing waits for the device. The numbers of a trajectory depend, to the last bit,
    on its own tokens alone, and are the same on every run.

    Args:
        stats: statistics of R tokens; its fields that are None are left out.
        cu_seqlens: ``[N + 1]`` int32 or int64, rising from 0 to T: trajectory k has the tokens cu_seqlens[k], ...,
            cu_seqlens[k + 1] - 1. On the device of ``stats``.
        rows: ``[T]`` int64: where in ``stats`` the trajectories' tokens stand. None: in order, T = R.
        nll_before: ``[T]`` nll of the trajectories' tokens, in their order, under an earlier state of the student: also
            give ``loss_delta``.
        max_rank: ranks beyond it count as it, at least 1.
        impl: "triton", "torch", or "auto": Triton on a CUDA device where it is installed, else torch.

    Returns:
        TrajectoryReduction of ``[N]`` tensors on the device of ``stats``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ``max_rank`` below 1, an unknown ``impl`` or one that
            cannot run here. On a CPU also values of ``cu_seqlens`` or ``rows`` that are out of range; on a GPU nobody
            has seen those when this returns: what Triton would read outside of ``stats`` is NaN, and torch stops with a
            device-side assertion.
    """
    if kernel_form(impl, cu_seqlens.device) == "torch":
        return trajectory_reduce_naive(stats, cu_seqlens, rows=rows, nll_before=nll_before, max_rank=max_rank)
    _check(stats, cu_seqlens, rows, nll_before, max_rank)
    from lark_fast.kernels.trajectory_reduce_triton import reduce_on_device  # Triton may be missing

    given = [getattr(stats, name) for name in TOKEN_FIELDS]
    n_tokens, sums, means, rsr = reduce_on_device(given, cu_seqlens, rows, nll_before, max_rank)

    def where_given(numbers: Tensor) -> TrajectoryValues:
        inputs = (*given, nll_before)
        return TrajectoryValues(*(None if x is None else row for x, row in zip(inputs, numbers, strict=True)))

    rsr = None if stats.rank is None else rsr
    return TrajectoryReduction(n_tokens=n_tokens, sums=where_given(sums), means=where_given(means), rsr=rsr)


def trajectory_reduce_naive(
    stats: TokenStats,
    cu_seqlens: Tensor,
    *,
    rows: Tensor | None = None,
    nll_before: Tensor | None = None,
    max_rank: int = MAX_RANK,
) -> TrajectoryReduction:
    """The definition in plain torch; arguments and result as ``trajectory_reduce``."""
    _check(stats, cu_seqlens, rows, nll_before, max_rank)
    given = [getattr(stats, name) for name in TOKEN_FIELDS]
    tokens = [None if value is None else (value if rows is None else value[rows]).double() for value in given]
    nll, brier, entropy, rank, agreement, brier_topk = tokens

    def over_trajectories(values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", offsets=cu_seqlens, initial=0.0, unsafe=True)

    nll_sum = over_trajectories(nll)

    def total(values: Tensor | None) -> Tensor | None:
        return None if values is None else over_trajectories(values).masked_fill(nll_sum.isnan(), float("nan"))

    n_tokens = cu_seqlens.diff().long()
    sums = TrajectoryValues(
        nll=nll_sum,
        brier=total(brier),
        entropy=total(entropy),
        rank=total(None if rank is None else rank.clamp(max=max_rank)),
        agreement=total(agreement),
        brier_topk=total(brier_topk),
        loss_delta=total(None if nll_before is None else nll_before.double() - nll),
    )
    values = [getattr(sums, field.name) for field in fields(sums)]
    rsr = None if rank is None else sums.rank / sums.nll.clamp(min=SMALLEST_NLL)
    return TrajectoryReduction(
        n_tokens=n_tokens,
        sums=sums,
        means=TrajectoryValues(*(None if value is None else value / n_tokens for value in values)),
        rsr=None if rsr is None else rsr.masked_fill(n_tokens == 0, float("nan")),
    )


def _check(
    stats: TokenStats, cu_seqlens: Tensor, rows: Tensor | None, nll_before: Tensor | None, max_rank: int
) -> None:
    given = {name: getattr(stats, name) for name in TOKEN_FIELDS if getattr(stats, name) is not None}
    for name, value in given.items():
        if value.ndim != 1 or len(value) != len(stats.nll):
            shape = list(value.shape)
            raise ValueError(f"the fields of stats are [R] with one R: {name} is {shape}, nll {list(stats.nll.shape)}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        shape = list(cu_seqlens.shape)
        raise ValueError(f"cu_seqlens is [N + 1] int32 or int64, at least [1], not {shape} {cu_seqlens.dtype}")
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows is [T] int64, not {list(rows.shape)} {rows.dtype}")
    n_tokens = len(stats.nll if rows is None else rows)
    if nll_before is not None and (nll_before.shape != (n_tokens,) or not nll_before.is_floating_point()):
        shape = list(nll_before.shape)
        raise ValueError(f"nll_before is [T] = [{n_tokens}] of a floating dtype, not {shape} {nll_before.dtype}")
    if max_rank < 1:
        raise ValueError(f"max_rank={max_rank}: at least 1")
    tensors = [*given.values(), cu_seqlens, *(x for x in (rows, nll_before) if x is not None)]
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise ValueError(f"stats, cu_seqlens, rows and nll_before belong on one device, not on {', '.join(devices)}")
    if devices == ["cpu"]:
        _check_values(cu_seqlens, rows, len(stats.nll), n_tokens)


def _check_values(cu_seqlens: Tensor, rows: Tensor | None, n_rows: int, n_tokens: int) -> None:
    first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
    falls = (cu_seqlens.diff() < 0).any()
    if first != 0 or last != n_tokens or falls:
        detail = " and falls on its way" if falls else ""
        raise ValueError(f"cu_seqlens rises from 0 to T = {n_tokens}; this one goes from {first} to {last}{detail}")
    if rows is not None:
        outside = rows[(rows < 0) | (rows >= n_rows)]
        if len(outside):
            raise ValueError(f"rows lie in [0, R) = [0, {n_rows}), but one is {outside[0].item()}")
