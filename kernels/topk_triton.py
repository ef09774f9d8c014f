"""The Brier score with the softmax renormalised over the k largest logits, as Triton kernels: exact, without a sort.

Let t be the k-th largest logit of the words v != y (-inf where there are fewer). The label's rank is at most k exactly
where z_y >= t, and then the k largest logits are the label and the k - 1 largest others, else k others. Either way the
others are those above t, fewer than k, and copies of t. With m the largest logit, S1' and S2' the sums over those
others of e^(z-m) and of its square, and a = e^(z_y-m), or 0 where the label is not among the k:

    brier_topk = (S1'^2 + S2') / (S1' + a)^2

(softmax_sums.py says why this form.) To find t, the columns are cut into groups of neighbours, and

1. ``_take_maxima`` writes the maximum of every group, the label left out;
2. ``_choose_groups`` finds b, the k-th largest of these maxima, and lists the groups with a maximum above b: fewer
   than k, by what b is;
3. ``_score`` reads the logits of those groups. A logit above b is in one of them. So t is the k-th largest of the
   logits above b, where there are k of them; where there are not, t = b, since k groups have a logit of b or more.

Nothing here depends on how many logits tie or where the large ones lie: no list can overflow. The k-th largest of the
numbers a program holds in registers is found by bisection on their bits, in the order of the floats.

Traffic for V = 152064 and k = 50, groups of 64: the logits once, and about 2 % of them (k groups) a second time; the
maxima, 1 / 64 of the logits, are written and read once and stay in the L2 cache. Another kernel that walks over the
logits anyway can write the maxima in place of step 1.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lark_fast.kernels.head_triton import finish_logits
from lark_fast.kernels.softmax_sums_triton import LOG2_E

KEY_OF_MINUS_INF = tl.constexpr(-2139095041)
TILE = 4096  # logits a program of step 1 reads: 32 a thread, in loads of 16 bytes
MAXIMA_HELD, LOGITS_HELD = 8192, 16384  # what a program of step 2 and of step 3 can hold in its registers
LOGITS_REREAD = 4096  # what a program of step 3 reads at a time where it cannot hold them all
NUMBERS_PER_WARP = 1024
SCRATCH = 1 << 22  # maxima of one launch: 16 MiB, which the L2 cache keeps


@triton.jit
def _fold(bits):
    """Bits of a float32, as int32, to an integer in the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(z):
    return _fold(z.to(tl.int32, bitcast=True))


@triton.jit
def _value(key):
    return _fold(key).to(tl.float32, bitcast=True)


@triton.jit
def _middle(lowest, highest):
    """The mean, rounded up, of two int32 whose sum may not be one."""
    return (lowest | highest) - ((lowest ^ highest) >> 1)


@triton.jit
def _halve(lowest, highest, n_lowest, n_middle, k):
    """A step of bisection, after which ``lowest`` is as it was or has ``n_lowest`` >= k numbers at or above it."""
    middle = _middle(lowest, highest)
    enough = n_middle >= k
    highest = tl.where(enough, highest, middle - 1)
    return tl.where(enough, middle, lowest), highest, tl.where(enough, n_middle, n_lowest)


@triton.jit
def _kth_largest(keys, k, lowest, highest):
    """The k-th largest of ``keys``, none of them above ``highest``, or ``lowest`` where fewer than k are above it."""
    n_lowest = 0
    while (lowest < highest) & (n_lowest != k):
        n_middle = tl.sum((keys >= _middle(lowest, highest)).to(tl.int32))
        lowest, highest, n_lowest = _halve(lowest, highest, n_lowest, n_middle, k)
    smallest = tl.min(tl.where(keys >= lowest, keys, 0x7FFFFFFF))
    return tl.where(n_lowest == k, smallest, lowest)


@triton.jit
def _load_logits(logits, bias, logit_scale, softcap, column, here):
    """One row's finished logits at ``column``, where they are ``here``."""
    z = tl.load(logits + column, mask=here, other=0.0).to(tl.float32)
    own_bias = 0.0
    if bias is not None:
        own_bias = tl.load(bias + column, mask=here, other=0.0).to(tl.float32)
    return finish_logits(
        z, own_bias, logit_scale, softcap, bias is not None, logit_scale is not None, softcap is not None
    )


@triton.jit
def _load_others(row, column, n_columns, label):
    """A ``row``'s logits at ``column``: -inf at the label and beyond the row's end, +inf in place of NaN.

    ``row``: the first arguments of ``_load_logits``.
    """
    # The label is not part of the mask: a mask of single columns would keep the loads from being wide.
    here = column < n_columns
    z = _load_logits(*row, column, here)
    z = tl.where(z == z, z, float("inf"))
    return tl.where(here & (column != label), z, float("-inf"))


@triton.jit
def _take_maxima(
    logits, labels, bias, logit_scale, softcap, maxima, stride, n_columns, n_groups,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Logits [T, C] -> maxima [T, n_groups] of ``GROUP`` columns each, the label's left out; ``GROUPS`` a program.

    +inf where a logit is NaN. Rows without a label are not read.
    """
    n_tiles = tl.cdiv(n_groups, GROUPS)
    place = tl.program_id(0) // n_tiles
    group = (tl.program_id(0) % n_tiles) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    label = tl.load(labels + place)
    to_read = tl.where((label >= 0) & (label < n_columns), n_columns, 0)
    place = place.to(tl.int64)
    row = (logits + place * stride, bias, logit_scale, softcap)
    z = _load_others(row, column, to_read, label)
    tl.store(maxima + place * n_groups + group, tl.max(z, 1), mask=group < n_groups)


@triton.jit(do_not_specialize=["k"])
def _choose_groups(maxima, bound, chosen, n_groups, k, GROUPS: tl.constexpr, SLOTS: tl.constexpr):
    """Maxima [T, n_groups] -> the k-th largest [T], and chosen [T, SLOTS]: the groups above it, then n_groups.

    The bound is NaN where a maximum is +inf.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    keys = _key(tl.load(maxima + row * n_groups + group, mask=group < n_groups, other=float("-inf")))
    top = tl.max(keys)
    kth = _kth_largest(keys, k, tl.cast(KEY_OF_MINUS_INF, tl.int32), top)
    above = (keys > kth).to(tl.int32)
    tl.store(chosen + row * SLOTS + tl.cumsum(above, 0) - 1, group, mask=above != 0)
    slot = tl.arange(0, SLOTS)
    tl.store(chosen + row * SLOTS + slot, n_groups, mask=slot >= tl.sum(above))
    tl.store(bound + row, tl.where(_value(top) < float("inf"), _value(kth), float("nan")))


@triton.jit
def _load_chosen(row, chosen, n_columns, label, GROUP: tl.constexpr, STEP: tl.constexpr):
    """``_load_others`` [STEP, GROUP] of the STEP groups in ``chosen``."""
    group = tl.load(chosen + tl.arange(0, STEP))
    return _load_others(row, group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], n_columns, label)


@triton.jit(do_not_specialize=["k"])
def _score(
    logits, labels, bias, logit_scale, softcap, bound, chosen, score, stride, n_columns, k,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Logits [T, C], bound [T] and chosen [T, SLOTS] -> brier_topk [T]; a program holds the logits of STEP groups."""
    place = tl.program_id(0).to(tl.int64)
    row = (logits + place * stride, bias, logit_scale, softcap)
    chosen += place * SLOTS
    label = tl.load(labels + place)
    known = (label >= 0) & (label < n_columns)
    z_label = _load_logits(*row, label, known)
    least = tl.load(bound + place)
    finite = known & (least == least) & (tl.abs(z_label) < float("inf"))

    kth = _key(least)
    top = kth
    if SLOTS == STEP:
        keys = _key(_load_chosen(row, chosen, n_columns, label, GROUP, STEP))
        top = tl.maximum(kth, tl.max(keys))
        kth = _kth_largest(keys, k, kth, top)
    else:  # too many to hold: every step of the bisection reads them again
        for start in range(0, SLOTS, STEP):
            top = tl.maximum(top, tl.max(_key(_load_chosen(row, chosen + start, n_columns, label, GROUP, STEP))))
        highest = top
        n_kth = 0
        while kth < highest:
            middle = _middle(kth, highest)
            n_middle = 0
            for start in range(0, SLOTS, STEP):
                keys = _key(_load_chosen(row, chosen + start, n_columns, label, GROUP, STEP))
                n_middle += tl.sum((keys >= middle).to(tl.int32))
            kth, highest, n_kth = _halve(kth, highest, n_kth, n_middle, k)

    t = _value(kth)
    m = tl.where(finite, tl.maximum(_value(top), z_label), 0.0)
    s1 = 0.0
    s2 = 0.0
    n_above = 0
    for start in range(0, SLOTS, STEP):
        z = _load_chosen(row, chosen + start, n_columns, label, GROUP, STEP)
        above = _key(z) > kth
        e = tl.where(above, tl.exp2((z - m) * LOG2_E), 0.0)
        s1 += tl.sum(e)
        s2 += tl.sum(e * e)
        n_above += tl.sum(above.to(tl.int32))
    inside = z_label >= t
    copies = (k - inside.to(tl.int32) - n_above).to(tl.float32)
    e = tl.exp2((t - m) * LOG2_E)
    s1 += copies * e
    s2 += copies * e * e
    total = s1 + tl.where(inside, tl.exp2((z_label - m) * LOG2_E), 0.0)
    tl.store(score + place, tl.where(finite, (s1 * s1 + s2) / (total * total), float("nan")))


class Plan(NamedTuple):
    """How a row is cut; every number but ``n_groups`` is a power of two."""

    group: int  # columns of a group
    n_groups: int
    slots: int  # room for the groups above the k-th largest maximum
    step: int  # groups whose logits the last kernel holds at a time: all of them for any usual k
    tile: int = TILE

    @classmethod
    def of(cls, n_columns: int, k: int) -> "Plan":
        """Groups such that steps 2 and 3 look at about as many numbers, maxima and logits."""
        group = max(8, triton.next_power_of_2(round((n_columns / k) ** 0.5)))
        while triton.cdiv(n_columns, group) > MAXIMA_HELD:
            group *= 2
        n_groups = triton.cdiv(n_columns, group)
        slots = triton.next_power_of_2(max(1, min(k - 1, n_groups)))
        step = slots if slots * group <= LOGITS_HELD else max(1, LOGITS_REREAD // group)
        return cls(group, n_groups, slots, step)


def brier_topk(
    logits: Tensor,
    labels: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:
    """Brier score of the label under the softmax over the ``top_k`` largest logits.

    A label that ties with the k-th largest logit counts as one of the k.

    Args:
        logits: ``[T, C]`` float32, bfloat16 or float16, with neighbouring columns; not changed.
        labels: ``[T]`` int64; a row whose label is no column is not scored.
        top_k: at least 1; above C it counts as C.
        bias, softcap, logit_scale: what the head still has to do to the logits (head.py); bias ``[C]``.

    Returns:
        ``[T]`` float32: NaN for rows that are not scored, that have a NaN or +inf logit, or whose label has a logit of
        -inf.
    """
    k = min(top_k, logits.shape[1])
    return launch(logits, labels, k, bias, softcap, logit_scale, Plan.of(logits.shape[1], k), SCRATCH)


def launch(
    logits: Tensor,
    labels: Tensor,
    k: int,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    plan: Plan,
    scratch: int,
) -> Tensor:
    """``brier_topk`` with k at most C, cut as ``plan`` says, some rows at a time so that ``scratch`` maxima suffice."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1
    score = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    labels = labels.contiguous()
    # Whole numbers must not become integers of the kernel, which would be another kernel.
    finish = (bias, *(None if x is None else float(x) for x in (logit_scale, softcap)))
    n_columns, stride = logits.shape[1], logits.stride(0)
    group, n_groups, slots, step, tile = plan
    padded = triton.next_power_of_2(n_groups)
    tile_groups = min(padded, max(1, tile // group))
    # A multiple of 16, so that every part begins at an address as round as the first one's: one kernel for all.
    n_rows = min(max(1, len(logits)), max(16, scratch // n_groups // 16 * 16))
    maxima = torch.empty(n_rows, n_groups, dtype=torch.float32, device=logits.device)
    bound = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(n_rows, slots, dtype=torch.int32, device=logits.device)
    for start in range(0, len(logits), n_rows):
        rows = slice(start, start + n_rows)
        x, y, out = logits[rows], labels[rows], score[rows]
        _take_maxima[(len(x) * triton.cdiv(n_groups, tile_groups),)](
            x, y, *finish, maxima, stride, n_columns, n_groups,
            GROUP=group, GROUPS=tile_groups, num_warps=_warps(tile_groups * group),
        )  # fmt: skip
        _choose_groups[(len(x),)](
            maxima, bound, chosen, n_groups, k, GROUPS=padded, SLOTS=slots, num_warps=_warps(padded)
        )
        _score[(len(x),)](
            x, y, *finish, bound, chosen, out, stride, n_columns, k,
            GROUP=group, SLOTS=slots, STEP=step, num_warps=_warps(step * group),
        )  # fmt: skip
    return score


def _warps(numbers: int) -> int:
    """Warps of a program that holds so many numbers, a power of two."""
    return max(1, min(16, numbers // NUMBERS_PER_WARP))
