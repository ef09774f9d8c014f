"""chi2.py as one Triton kernel: a program takes some problems, and all their numbers stay in its registers.

The energies of a program are a tile [MAJOR, ROWS, MINOR] of its ROWS problems; candidate k is at k = major * MINOR +
minor. A warp's lanes lie along MINOR and then ROWS, so most of a reduction over candidates stays inside a thread: over
64 candidates, 8 a thread, it takes 3 shuffles for 4 problems at once, where a row a warp would take 5 for each.

Budget form: the order statistics are B + 1 maxima, each but the last followed by taking out the first candidate that
has it. They are compared in the dtype they come in, so they are exact, and ties go by index. Sums and differences are
float64. Each problem stops at its own budget; a program goes on until all of its problems have.

tau form, without a sort: for a candidate's energy c, T(c) = sum p (e - c)_+ is chi2.py's T_{m-1} where c = e_m, so c
holds weight exactly when T(c) < tau. Start with the lowest c. As long as T(c) >= tau, nu' = c + (T(c) - tau) / P, with
P the prior above c, solves the equation over those above c, which hold the support, so that nu' is not above nu;
whatever lies at or below nu' is out, and c becomes the lowest that is left (Michelot, 1986). Every turn drops a
candidate or more; of 33 random energies most go in the first. The weights are e - c + (tau - T(c)) / P as in chi2.py,
which keeps the digits that e - nu would lose.

For one H200 and 1,000,000 problems of 33 float32 energies, B = 3, by arithmetic (it has never run on a GPU): 132 MB are
read, 132 MB of q and 40 MB of the rest are written, 71 us at the 4.3 TB/s of a copy; float64: 132 us. What the compiler
makes of it for sm_90 is some 870 instructions for the 4 problems of a warp (60 of them and 6 shuffles for each of B
removals), so 220 issue slots a problem, half of them for the 31 cells of a tile of 64 that hold nothing: 132 processors
at 1.7 GHz that issue 4 a cycle take 0.24 ms for a million. Expected are 0.25 to 0.4 ms.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lark_fast.kernels import chi2
from lark_fast.kernels.chi2_tensors import SIZES

TIE = tl.constexpr(chi2.TIE_SHARE_OF_SPREAD)
STEP_BELOW = tl.constexpr(chi2.REFERENCE_STEP_BELOW_MINIMUM)
DEGENERATE = tl.constexpr(chi2.REFERENCE_DEGENERATE)
BEYOND = tl.constexpr(2**30)  # a column that no problem has

WRONG = tl.constexpr(-1)  # in the place of a support: what the problem came with cannot be used


@triton.jit
def _sum(x):
    """[MAJOR, ROWS, MINOR] -> [ROWS]."""
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def _max(x):
    return tl.max(tl.max(x, 0), 1)


@triton.jit
def _min(x):
    return tl.min(tl.min(x, 0), 1)


@triton.jit
def _tile(x):
    """[ROWS] -> as wide as a tile."""
    return x[None, :, None]


@triton.jit
def _number(value: tl.constexpr):
    """A float64; a bare number would be rounded to float32."""
    return tl.full([], value, tl.float64)


@triton.jit
def _or_one(x):
    return tl.where(x == 0, 1.0, x)


@triton.jit
def _order_statistics(e, valid, column, removals):
    """What is highest once the first ``removals`` [ROWS] of the highest are out, by index where they tie.

    Also the last one that went out, the sum of those that did in their order, and the tile of which they are. No valid
    energy is -inf, and that is what is highest where none is left.
    """
    left = tl.where(valid, e, float("-inf"))
    current = _max(left)
    last = current
    total = tl.zeros(removals.shape, tl.float64)
    rounds = tl.max(removals, 0)
    r = 0
    while r < rounds:
        going = r < removals
        first = _min(tl.where(left == _tile(current), column, BEYOND))
        left = tl.where((column == _tile(first)) & _tile(going), float("-inf"), left)
        total += tl.where(going, current.to(tl.float64), 0.0)
        last = tl.where(going, current, last)
        current = tl.where(going, _max(left), current)
        r += 1
    return current, last, total, valid & (left == float("-inf"))


@triton.jit
def _power_of_two_scale(size, WIDE: tl.constexpr):
    """Powers of two that bring ``size`` [ROWS] float64 near 1; 1 for energies of float32, which need none."""
    if WIDE:
        exponent = (size.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        return (tl.minimum(tl.maximum(2046 - exponent, 23), 2023) << 52).to(tl.float64, bitcast=True)
    else:
        return tl.zeros(size.shape, tl.float64) + 1.0


@triton.jit
def _just_below_minus(x):
    """The largest float64 below -x, for finite x that are not negative."""
    return -(x.to(tl.int64, bitcast=True) + 1).to(tl.float64, bitcast=True)


@triton.jit
def _tau_support(e, p, valid, lowest, highest, tau):
    """The lowest energy that holds weight, T and the prior at or above it, [ROWS] each; what is not valid has p = 0."""
    c = lowest
    searching = lowest <= highest  # there is a candidate
    total = tl.zeros(c.shape, tl.float64)
    while tl.max(searching.to(tl.int32), 0) > 0:
        over = tl.where(valid & (e > _tile(c)), e - _tile(c), 0.0)
        total = _sum(p * over)
        searching = searching & (total >= tau)
        nu = c + (total - tau) / _or_one(_sum(tl.where(over > 0, p, 0.0)))
        # Rounding may put nu at or above the highest, which holds weight whatever tau is.
        above = _min(tl.where(valid & (e > _tile(nu)), e, float("inf")))
        c = tl.where(searching, tl.minimum(above, highest), c)
    return c, total, _sum(tl.where(valid & (e >= _tile(c)), p, 0.0))


@triton.jit(do_not_specialize=["n_here", "n_problems", "n_columns", "prior_stride", "setting_stride"])
def _solve(
    energies, prior, offsets, order, settings, q, support, numbers,
    n_here, n_problems, n_columns, prior_stride, setting_stride,
    FORM: tl.constexpr, MAJOR: tl.constexpr, ROWS: tl.constexpr, MINOR: tl.constexpr,
):  # fmt: skip
    """Problems ``order`` (all: None) of ``energies`` [N, n_columns], or flat with ``offsets`` [N + 1].

    ``prior`` as the energies, or [n_columns] where ``prior_stride`` is 0; ``settings`` budgets int64 or taus float64,
    [N] or one number with ``setting_stride`` 0. Writes q as the energies, support [N] or WRONG, and numbers
    [4, N]: nu, tau, effective sample size, divergence.
    """
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = place < n_here
    problem = place
    if order is not None:
        problem = tl.load(order + place, mask=exists, other=0)
    if offsets is not None:
        begin = tl.load(offsets + problem, mask=exists, other=0)
        size = (tl.load(offsets + problem + 1, mask=exists, other=0) - begin).to(tl.int32)
        prior_begin = begin
    else:
        begin = problem * n_columns
        size = tl.full([ROWS], 0, tl.int32) + n_columns
        prior_begin = problem * prior_stride
    column = tl.arange(0, MAJOR)[:, None, None] * MINOR + tl.arange(0, MINOR)[None, None, :]
    column = tl.broadcast_to(column, [MAJOR, ROWS, MINOR])
    here = column < _tile(tl.where(exists, size, 0))
    e = tl.load(_tile(energies + begin) + column, mask=here, other=float("nan"))
    setting = tl.load(settings + problem * setting_stride, mask=exists, other=1)

    valid = here & (e == e)
    if FORM == "reference":
        valid = valid & (e > float("-inf"))
    wrong = tl.zeros([ROWS], tl.int1)
    if prior is not None:
        prior_share = tl.load(_tile(prior + prior_begin) + column, mask=valid, other=0.0).to(tl.float64)
        unusable = ~((prior_share >= 0) & (prior_share < float("inf")))
        infinite = valid & (tl.abs(e) == float("inf"))  # also where the prior is 0
        some = _max(valid.to(tl.int32))
        wrong = _max((unusable | infinite).to(tl.int32)) > 0
        valid = valid & (prior_share > 0)
        wrong = wrong | (some > _max(valid.to(tl.int32)))
    n_valid = _sum(valid.to(tl.int32))
    empty = n_valid == 0
    lowest = _min(tl.where(valid, e, float("inf"))).to(tl.float64)
    highest = _max(tl.where(valid, e, float("-inf"))).to(tl.float64)
    if FORM != "reference":
        wrong = wrong | (~empty & ((lowest == float("-inf")) | (highest == float("inf"))))
    # A row's numbers are divided by once and multiplied with from then on: a division of float64 takes dozens of steps.
    if prior is None:
        mass = tl.maximum(n_valid, 1).to(tl.float64)
        p = tl.where(valid, _tile(1.0 / mass), 0.0)
    else:
        prior_share = tl.where(valid, prior_share, 0.0)
        prior_share = prior_share / _tile(_or_one(_max(prior_share)))  # of the largest one that is valid
        mass = _or_one(_sum(prior_share))
        p = prior_share * _tile(1.0 / mass)
    usable = (setting > 0) & (setting < float("inf")) if FORM == "tau" else setting >= 1
    wrong = wrong | ~usable
    none = empty | wrong  # nothing to solve

    if FORM == "reference":
        n_held = tl.minimum(setting, n_valid.to(tl.int64)).to(tl.int32)
        below, last, total, taken = _order_statistics(e, valid, column, n_held)
        last = last.to(tl.float64)
        nu = tl.where(n_held < n_valid, below.to(tl.float64), last - _number(STEP_BELOW))
        held = tl.maximum(n_held, 1).to(tl.float64)
        denominator = total / held - nu
        degenerate = denominator <= _number(DEGENERATE)
        linear = (e.to(tl.float64) - _tile(nu)) / _tile(denominator * held)
        weights = tl.where(_tile(degenerate), _tile(1.0 / held), linear)
        # Without any energy all share, padding too: nobody can tell it from candidates.
        alike = tl.where(here, 1.0 / _tile(tl.maximum(size, 1).to(tl.float64)), 0.0)
        weights = tl.where(_tile(empty), alike, tl.where(taken, weights, 0.0))
        tau = tl.where(degenerate, 0.0, denominator * held / tl.maximum(n_valid, 1).to(tl.float64))
        nu = tl.where(degenerate, highest, nu)
        nu = tl.where(empty, float("nan"), nu)
        tau = tl.where(empty, float("nan"), tau)
        p = tl.where(_tile(empty), alike, p)
    else:
        scale = _power_of_two_scale(tl.where(none, 1.0, tl.maximum(highest, -lowest)), e.dtype == tl.float64)
        x = e.to(tl.float64) * _tile(scale)
        low = tl.where(none, 0.0, lowest * scale)
        high = tl.where(none, -1.0, highest * scale)
        if FORM == "tau":
            limit = _number(2.0**1000)
            tau = setting * tl.minimum(scale, limit / setting)
            tau = tl.minimum(tl.maximum(tau, 1 / limit), limit)
            c, over, held = _tau_support(x, p, valid, low, high, tau)
            above_nu = (tau - over) / _or_one(held)
            weights = tl.where(valid & (x >= _tile(c)), x - _tile(c) + _tile(above_nu), 0.0)
            nu = tl.where(empty, float("nan"), (c - above_nu) * (1.0 / scale))
            tau = setting
        else:
            few = (n_valid <= setting) | none
            removals = tl.where(few, 0, setting).to(tl.int32)
            found, _, _, _ = _order_statistics(e, valid, column, removals)
            nu = found.to(tl.float64)
            cut = tl.where(few, low, nu * scale)
            tie = _number(TIE) * (high - low)
            flat = high - cut <= tie
            # Above nu by more than a tie. Where p is shared: below the highest by no more than one; or any.
            alike = few | flat
            above = x - _tile(tl.where(alike, high, cut))
            bound = tl.where(few, _number(-1.7e308), tl.where(flat, _just_below_minus(tie), tie))
            weights = tl.where(_tile(alike), 1.0, above)
            weights = tl.where(valid & (above > _tile(bound)), weights, 0.0)
            nu = tl.where(few, float("-inf"), tl.where(flat, highest, nu))
            nu = tl.where(empty, float("nan"), nu)
        unit = tl.zeros([ROWS], tl.float64) + 1.0
        if prior is not None:
            # Relative to the largest prior that counts, so that a support of tiny priors does not underflow.
            unit = _or_one(_max(tl.where(weights > 0, prior_share, 0.0)))
            weights = tl.where(weights > 0, weights * (prior_share / _tile(unit)), 0.0)
        total = _sum(weights)
        weights = weights * _tile(1.0 / _or_one(total))
        if FORM == "exact":
            tau = tl.where(few, float("inf"), tl.where(flat, 0.0, total * unit / mass * (1.0 / scale)))
            tau = tl.where(empty, float("nan"), tau)

    tl.store(_tile(q + begin) + column, weights.to(q.dtype.element_ty), mask=here)
    squares = _sum(weights * weights)
    difference = weights - p
    if prior is None:
        terms = difference * difference * _tile(mass)
    else:
        beyond = tl.where(weights > 0, float("inf"), 0.0)  # a prior so small that its share is 0
        terms = tl.where(p > 0, difference * difference / tl.where(p > 0, p, 1.0), beyond)
    n_above = _sum((weights > 0).to(tl.int32))
    tl.store(support + problem, tl.where(wrong, WRONG, n_above).to(tl.int64), mask=exists)
    n = tl.cast(n_problems, tl.int64)
    tl.store(numbers + problem, nu, mask=exists)
    tl.store(numbers + n + problem, tau, mask=exists)
    tl.store(numbers + 2 * n + problem, tl.where(squares > 0, 1.0 / _or_one(squares), 0.0), mask=exists)
    tl.store(numbers + 3 * n + problem, _sum(terms), mask=exists)


class Tile(NamedTuple):
    """How a program is cut."""

    major: int
    rows: int
    minor: int
    num_warps: int


def tile(size: int) -> Tile:
    """For problems of up to ``size`` candidates, one of ``SIZES``: 8 or 16 cells a thread, a problem in one warp up to
    512 of them."""
    assert size in SIZES
    minor = min(32, max(8, size // 8))
    rows = max(1024 // size, 4 if size <= 512 else 1)
    return Tile(size // minor, rows, minor, max(4, size // 512))


def launch(
    form: str,
    size: int,
    energies: Tensor,
    prior: Tensor | None,
    settings: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
    *,
    offsets: Tensor | None = None,
    order: Tensor | None = None,
) -> None:
    """One launch over checked arguments, contiguous and on one device.

    Args:
        form: "exact", "reference" or "tau".
        size: one of ``SIZES``, that no problem exceeds.
        energies: ``[N, K]`` float32 or float64, or flat ``[M]`` with ``offsets``.
        prior: as the energies, ``[K]``, or None.
        settings: budgets int64 or taus float64, ``[N]`` or ``[1]``.
        out: q as the energies, support ``[N]`` int64 (WRONG for problems that cannot be solved), numbers ``[4, N]``
            float64: nu, tau, effective sample size, divergence.
        offsets: ``[N + 1]`` int64.
        order: ``[n]`` int64: the problems to solve. None: all.
    """
    q, support, numbers = out
    cut = tile(size)
    n = len(support) if order is None else len(order)
    if n == 0:
        return
    n_columns = energies.shape[-1] if offsets is None else 0
    prior_stride = n_columns if prior is not None and prior.ndim == 2 else 0
    with torch.cuda.device_of(energies):
        _solve[(triton.cdiv(n, cut.rows),)](
            energies, prior, offsets, order, settings, q, support, numbers, n, len(support), n_columns, prior_stride,
            0 if len(settings) == 1 else 1, FORM=form, MAJOR=cut.major, ROWS=cut.rows, MINOR=cut.minor,
            num_warps=cut.num_warps,
        )  # fmt: skip
