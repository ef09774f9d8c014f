"""softmax_sums.py as Triton code: taking a tile of logits into the sums, and the kernel that ends a row.

Formulas: softmax_sums.py. Splits are combined in their order, without atomics or locks: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lark_fast.kernels import softmax_sums
from lark_fast.kernels.softmax_sums import TokenStats, Wanted

LOWEST = tl.constexpr(softmax_sums.LOWEST)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FINISH_ROWS = 128


@triton.jit
def no_sums(ROWS: tl.constexpr):
    """What ``fold`` starts from."""
    zero = tl.zeros([ROWS], tl.float32)
    m = tl.full([ROWS], LOWEST, tl.float32)
    return m, tl.ceil(m * LOG2_E), zero, zero, zero, tl.zeros([ROWS], tl.int32)


@triton.jit
def fold(
    z, z_label, m, base, s1, s2, sz, count,
    BRIER: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Take a tile of logits into the running sums of its rows: z [R, C] float32, ``LOWEST`` where there is none.

    z_label, m, base, s1, s2 and sz [R] float32, count [R] int32. Until ``store_sums``, the sums are in units of log 2
    and relative to base, which is m in those units, rounded up to a whole number. So one multiply-add gives an
    exponent, and moving the sums to another base is exact.
    """
    if RANK:
        count += tl.sum((z > z_label[:, None]).to(tl.int32), 1)
    m = tl.maximum(m, tl.max(z, 1))
    new_base = tl.ceil(m * LOG2_E)
    shift = base - new_base
    scale = tl.exp2(shift)
    z = tl.fma(z, LOG2_E, -new_base[:, None])
    e = tl.exp2(z)
    if ENTROPY:
        sz = (sz + shift * s1) * scale + tl.sum(z * e, 1)
    if BRIER:
        s2 = s2 * scale * scale + tl.sum(e * e, 1)
    s1 = s1 * scale + tl.sum(e, 1)
    return m, new_base, s1, s2, sz, count


@triton.jit
def has_gaps(first, n_columns, label, COLUMNS: tl.constexpr):
    """Whether COLUMNS columns from ``first`` on hold the label's own of any row [R], or reach past the last."""
    held = (label >= first) & (label < first + COLUMNS)
    return (first + COLUMNS > n_columns) | (tl.max(held.to(tl.int32), 0) > 0)


@triton.jit
def leave_out(z, column, n_columns, label, gaps, CLAMP: tl.constexpr, BRANCH: tl.constexpr):
    """``LOWEST`` in place of the label's own column [R] (none, where it is no column's) and of those past the end.

    z [R, C] float32; column [C] their places in the row; gaps: ``has_gaps`` of them. CLAMP: also in place of lower
    logits, as of -inf. BRANCH: without gaps, branch over the work. Few tiles have any, so that pays, unless the barrier
    it takes would stand in a loop whose loads are pipelined: those would not be any more.
    """
    if CLAMP:
        z = tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    if BRANCH:
        if gaps:
            tl.debug_barrier()  # without something like it, the compiler does the work always and then selects
            z = tl.where((column[None, :] >= n_columns) | (column[None, :] == label[:, None]), LOWEST, z)
    else:
        z = tl.where((column[None, :] >= n_columns) | (column[None, :] == label[:, None]), LOWEST, z)
    return z


@triton.jit
def store_sums(
    partials, place, exists, stride, m, base, s1, s2, sz, count,
    BRIER: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Write what ``fold`` left of rows ``place`` [R] that exist into one split's ``partials`` [5, stride]."""
    out = partials + place
    above = tl.fma(m, LOG2_E, -base)  # of m over base: in (-1, 0], or a rounding of a logit beyond 10^7
    factor = tl.exp2(-above)
    sz = (sz - above * s1) * factor * LN_2
    s2 *= factor * factor
    s1 *= factor
    tl.store(out, m, mask=exists)
    tl.store(out + stride, s1, mask=exists)
    if BRIER:
        tl.store(out + 2 * stride, s2, mask=exists)
    if ENTROPY:
        tl.store(out + 3 * stride, sz, mask=exists)
    if RANK:
        tl.store(out + 4 * stride, count.to(tl.float32), mask=exists)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, right to the last digits near 0 (Kahan's correction of the rounding of 1 + x)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def _finish(
    partials, label_logit, nll, brier, entropy, rank, agreement, n_rows, n_splits,
    BRIER: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Partial sums [n_splits, 5, n_rows] and the label's logit [n_rows] -> the statistics [n_rows] of every row."""
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = place < n_rows
    z_label = tl.load(label_logit + place, mask=exists, other=0.0)
    m = z_label
    largest = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    s1 = tl.zeros([BLOCK_ROWS], tl.float32)
    s2 = tl.zeros([BLOCK_ROWS], tl.float32)
    sz = tl.zeros([BLOCK_ROWS], tl.float32)
    count = tl.zeros([BLOCK_ROWS], tl.float32)
    for split in range(n_splits):
        part = partials + tl.cast(split, tl.int64) * 5 * n_rows + place
        part_m = tl.load(part, mask=exists, other=LOWEST)
        part_s1 = tl.load(part + n_rows, mask=exists, other=0.0)
        new_m = tl.maximum(m, part_m)
        shift, part_shift = m - new_m, part_m - new_m
        scale, part_scale = tl.exp2(shift * LOG2_E), tl.exp2(part_shift * LOG2_E)
        if ENTROPY:
            part_sz = tl.load(part + 3 * n_rows, mask=exists, other=0.0)
            sz = (sz + shift * s1) * scale + (part_sz + part_shift * part_s1) * part_scale
        if BRIER:
            part_s2 = tl.load(part + 2 * n_rows, mask=exists, other=0.0)
            s2 = s2 * scale * scale + part_s2 * part_scale * part_scale
        if RANK:
            count += tl.load(part + 4 * n_rows, mask=exists, other=0.0)
        s1 = s1 * scale + part_s1 * part_scale
        largest = tl.maximum(largest, part_m)
        m = new_m
    x = z_label - m
    a = tl.exp2(x * LOG2_E)
    total = s1 + a
    log_total = tl.where(s1 < a, log1p(s1), tl.log(total))
    loss = log_total - x
    finite = (loss - loss) == 0.0
    if ENTROPY:
        # Its terms round to a little below 0 where the row is all but certain. A logit of -inf that no bias explains
        # makes it NaN: such a row is broken as a whole.
        spread = log_total - (sz + x * a) / total
        finite = finite & ((spread - spread) == 0.0)
    nan = float("nan")
    tl.store(nll + place, tl.where(finite, loss, nan), mask=exists)
    tl.store(agreement + place, finite & (z_label >= largest), mask=exists)
    if BRIER:
        tl.store(brier + place, tl.where(finite, (s1 * s1 + s2) / (total * total), nan), mask=exists)
    if ENTROPY:
        tl.store(entropy + place, tl.where(finite, tl.maximum(spread, 0.0), nan), mask=exists)
    if RANK:
        tl.store(rank + place, tl.where(finite, 1 + count.to(tl.int64), 0), mask=exists)


def finish(partials: Tensor, label_logit: Tensor, wanted: Wanted) -> TokenStats:
    """Statistics of rows with the partial sums ``[splits, 5, T]`` and the label's logit ``[T]``, float32 both."""
    n_splits, _, n_rows = partials.shape
    stats = empty_stats(n_rows, wanted, partials.device)
    if n_rows:
        _finish[(triton.cdiv(n_rows, FINISH_ROWS),)](
            partials, label_logit, stats.nll, stats.brier, stats.entropy, stats.rank, stats.agreement, n_rows, n_splits,
            BRIER=wanted.brier, ENTROPY=wanted.entropy, RANK=wanted.rank, BLOCK_ROWS=FINISH_ROWS,
        )  # fmt: skip
    return stats


def empty_stats(n_rows: int, wanted: Wanted, device: torch.device) -> TokenStats:
    """Uninitialised statistics of ``n_rows`` rows."""

    def floats() -> Tensor:  # each with memory of its own, and so at an address as round as the others'
        return torch.empty(n_rows, dtype=torch.float32, device=device)

    return TokenStats(
        nll=floats(),
        brier=floats() if wanted.brier else None,
        entropy=floats() if wanted.entropy else None,
        rank=torch.empty(n_rows, dtype=torch.int64, device=device) if wanted.rank else None,
        agreement=torch.empty(n_rows, dtype=torch.bool, device=device),
    )
