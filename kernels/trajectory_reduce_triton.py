"""trajectory_reduce.py as one Triton kernel.

A warp owns a trajectory and walks over its tokens, adding each statistic into a block of float64 sums that are added up
at the end. So nothing is shared between programs (no atomics, no second launch), and the order of the additions, hence
the last bit, depends on the trajectory's length alone: not on its place, nor on the others. That is also why the block
is not sized by the lengths at hand. It is small, as many trajectories are: a hundred tokens should not pay for a
thousand. Long ones are walked over two blocks at a time, so that a warp waits for memory once for both; splitting them
over several programs would gain a share of a millisecond behind a forward pass of seconds.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lark_fast.kernels import trajectory_reduce

SMALLEST_NLL = tl.constexpr(trajectory_reduce.SMALLEST_NLL)
N_VALUES = tl.constexpr(len(trajectory_reduce.TOKEN_FIELDS) + 1)
BLOCK = 128  # tokens; four a thread
UNROLLED = 2  # blocks of a step, while that many are left; four run out of registers


@triton.jit
def _load(field, at, here):
    """Values of one field at ``at`` as float64; 0 where it is not ``here``, or where there is no such field."""
    if field is None:
        return tl.zeros(at.shape, tl.float64)
    else:  # one return would have to be of one type in Triton's eyes
        return tl.load(field + at, mask=here, other=0).to(tl.float64)


@triton.jit
def _write(out, field, place: tl.constexpr, values, n, known, k, n_trajectories):
    """Add up a block of sums and write sum and mean of value ``place`` into ``out`` [2, N_VALUES, N]."""
    if field is not None:
        total = tl.where(known, tl.sum(values, 0), float("nan"))
        mean = tl.where(n > 0, total / tl.maximum(n, 1).to(tl.float64), float("nan"))
        wide = tl.cast(n_trajectories, tl.int64)
        tl.store(out + place * wide + k, total)
        tl.store(out + (N_VALUES + place) * wide + k, mean)


@triton.jit
def _add_block(
    nll, brier, entropy, rank, agreement, brier_topk, nll_before, rows, begin, end, n_rows, max_rank,
    nll_sum, brier_sum, entropy_sum, rank_sum, agreement_sum, topk_sum, delta_sum, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add tokens begin, ..., begin + BLOCK - 1 below end into the sums [BLOCK] float64."""
    token = begin + tl.arange(0, BLOCK)
    here = token < end
    at = token
    if rows is not None:
        at = tl.load(rows + token, mask=here, other=0)
    held = here & (at >= 0) & (at < n_rows)
    x = tl.where(here & ~held, float("nan"), _load(nll, at, held))
    nll_sum += x
    brier_sum += _load(brier, at, held)
    entropy_sum += _load(entropy, at, held)
    rank_sum += tl.minimum(_load(rank, at, held), max_rank)
    agreement_sum += _load(agreement, at, held)
    topk_sum += _load(brier_topk, at, held)
    if nll_before is not None:
        delta_sum += _load(nll_before, token, here) - x
    return nll_sum, brier_sum, entropy_sum, rank_sum, agreement_sum, topk_sum, delta_sum


@triton.jit(do_not_specialize=["n_rows", "n_tokens", "n_trajectories", "max_rank"])
def _reduce(
    nll, brier, entropy, rank, agreement, brier_topk, nll_before, rows, cu_seqlens, lengths, out, rsr,
    n_rows, n_tokens, n_trajectories, max_rank, BLOCK: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """Fields [n_rows], rows and nll_before [n_tokens] -> lengths [N], out [2, N_VALUES, N] and rsr [N]."""
    k = tl.program_id(0).to(tl.int64)
    # Wrong numbers in cu_seqlens or rows must not reach beyond the tensors: nobody could check them.
    begin = tl.maximum(tl.load(cu_seqlens + k).to(tl.int64), 0)
    end = tl.minimum(tl.load(cu_seqlens + k + 1).to(tl.int64), n_tokens)
    n = tl.maximum(end - begin, 0)
    nll_sum = tl.zeros([BLOCK], tl.float64)
    brier_sum = tl.zeros([BLOCK], tl.float64)
    entropy_sum = tl.zeros([BLOCK], tl.float64)
    rank_sum = tl.zeros([BLOCK], tl.float64)
    agreement_sum = tl.zeros([BLOCK], tl.float64)
    topk_sum = tl.zeros([BLOCK], tl.float64)
    delta_sum = tl.zeros([BLOCK], tl.float64)
    while end - begin >= UNROLLED * BLOCK:
        for _ in tl.static_range(UNROLLED):
            nll_sum, brier_sum, entropy_sum, rank_sum, agreement_sum, topk_sum, delta_sum = _add_block(
                nll, brier, entropy, rank, agreement, brier_topk, nll_before, rows, begin, end, n_rows, max_rank,
                nll_sum, brier_sum, entropy_sum, rank_sum, agreement_sum, topk_sum, delta_sum, BLOCK,
            )  # fmt: skip
            begin += BLOCK
    while begin < end:
        nll_sum, brier_sum, entropy_sum, rank_sum, agreement_sum, topk_sum, delta_sum = _add_block(
            nll, brier, entropy, rank, agreement, brier_topk, nll_before, rows, begin, end, n_rows, max_rank,
            nll_sum, brier_sum, entropy_sum, rank_sum, agreement_sum, topk_sum, delta_sum, BLOCK,
        )  # fmt: skip
        begin += BLOCK
    total = tl.sum(nll_sum, 0)
    known = total == total
    tl.store(lengths + k, n)
    _write(out, nll, 0, nll_sum, n, known, k, n_trajectories)
    _write(out, brier, 1, brier_sum, n, known, k, n_trajectories)
    _write(out, entropy, 2, entropy_sum, n, known, k, n_trajectories)
    _write(out, rank, 3, rank_sum, n, known, k, n_trajectories)
    _write(out, agreement, 4, agreement_sum, n, known, k, n_trajectories)
    _write(out, brier_topk, 5, topk_sum, n, known, k, n_trajectories)
    _write(out, nll_before, 6, delta_sum, n, known, k, n_trajectories)
    if rank is not None:
        smallest = tl.full([], SMALLEST_NLL, tl.float64)  # a bare number would be rounded to float32
        ratio = tl.sum(rank_sum, 0) / tl.maximum(total, smallest)
        tl.store(rsr + k, tl.where(known & (n > 0), ratio, float("nan")))


def reduce_on_device(
    fields: Sequence[Tensor | None], cu_seqlens: Tensor, rows: Tensor | None, nll_before: Tensor | None, max_rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch over checked arguments; strided ones are copied first.

    Args:
        fields: ``[R]`` each, in the order of ``TOKEN_FIELDS``, or None; nll is always there.
        cu_seqlens: ``[N + 1]``.
        rows: ``[T]`` or None.
        nll_before: ``[T]`` or None.
        max_rank: ranks beyond it count as it.

    Returns:
        Numbers of tokens ``[N]`` int64; sums and means ``[N_VALUES, N]`` float64 and rsr ``[N]`` float64. What belongs
        to absent fields is undefined.
    """
    n, nll = len(cu_seqlens) - 1, fields[0]
    lengths = torch.empty(n, dtype=torch.int64, device=nll.device)
    out = torch.empty(2, N_VALUES.value, n, dtype=torch.float64, device=nll.device)
    rsr = torch.empty(n, dtype=torch.float64, device=nll.device)
    if n > 0:
        inputs = [None if x is None else x.contiguous() for x in (*fields, nll_before, rows, cu_seqlens)]
        n_tokens = len(nll) if rows is None else len(rows)
        with torch.cuda.device_of(nll):
            _reduce[(n,)](
                *inputs, lengths, out, rsr, len(nll), n_tokens, n, max_rank,
                BLOCK=BLOCK, UNROLLED=UNROLLED, num_warps=1,
            )  # fmt: skip
    return lengths, *out, rsr
