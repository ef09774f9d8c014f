"""Selection under constraints by its dual: a few multipliers outside, closed forms inside.

For multipliers z of the sides of ``program.Sides`` the Lagrangian falls apart into problems, each solved as in
``lark_fast.kernels.chi2`` with tau = 1 and energies s = 1 + e / tau_n - A^T z:

    q_k(z) = p_k (s_k - nu_n)_+   with nu_n the root of  sum_k p_k (s_k - nu_n)_+ = 1   (nu_n >= 0 if problems compete)

The dual function D(z) is convex, once continuously differentiable and piecewise quadratic, with the gradient
bound - A q(z) and, where the supports S_n do not change, the Hessian

    sum_n [ sum_{k in S_n} p_k a_k a_k^T  -  (sum_{S_n} p_k a_k) (sum_{S_n} p_k a_k)^T / sum_{S_n} p_k ]

(a_k column k of A; the second term only where the sum of q_n is at its bound). It is minimised over z >= 0 by a
semismooth Newton method: the quadratic model is solved with its bounds, its minimiser gives the direction, and a line
search on the derivative along it makes every step a descent. As D is piecewise quadratic, the last step is exact up to
rounding. The damping falls with the gradient, as is right for Hessians that may be singular (Li, Fukushima, Qi and
Yamashita, Comput. Optim. Appl. 28, 2004).

z proves that nothing satisfies the constraints when  sum_n max_{k in n} (-A^T z)_k + bound . z < 0  (Farkas).
"""

import math

import numpy as np

from lark_fast.selection.constraints import Bools, Floats, Sides
from lark_fast.selection.program import (
    NotSolvedError,
    Program,
    chi2_of_problems,
    smallest_tau,
)

_TARGET = 1e-12  # of the relative residual, if rounding lets it get there
GOOD = 1e-9  # what a solution must have
_STEPS = 100
_FOLLOWED = 14  # halvings of 1/tau
_SEARCHES = 60
_FLAT = 0.5  # a line search may leave this share of the slope
_DAMPING = 1e-3  # per unit of relative residual, of a Hessian's natural size
_CERTAIN = 1e-10  # how far below 0, relative to its terms, Farkas' sum must be
_RADIUS_STEPS = 100
_FIRST_THETA = 1e-6  # of the largest 1/tau: about one over the spread of the energies


class InfeasibleError(Exception):
    """No selection satisfies the sides: ``z`` proves it. ``least``: if it is the radius, the least mean chi2."""

    def __init__(self, z: Floats, least: float | None = None) -> None:
        super().__init__("infeasible")
        self.z, self.least = z, least


class Dual:
    """q(z), the gradient and the Hessian of D, block by block of problems."""

    def __init__(self, program: Program, gain: Floats) -> None:
        self.program, self.gain = program, gain
        self.x = np.empty_like(gain)  # q / p of the last z
        self.tight = np.empty(program.n_problems, dtype=bool)  # its sum of q_n is held at 1
        self.inverse_prior = 1 / program.prior

    def gradient(self, z: Floats) -> Floats:
        """bound - A q(z), ``[M]``."""
        program, sides = self.program, self.program.sides
        values = self._row_values(z)
        totals = np.zeros(len(program.rows))
        for problems, cells in program.blocks():
            s = self.gain[cells] - program.rows.adjoint(values, cells)
            prior, starts, sizes = self._part(problems, cells)
            top = np.maximum.reduceat(s, starts)
            s -= np.repeat(top, sizes)  # only differences count, and they stay exact however large z grows
            nu = _root(s, prior, self.inverse_prior[cells], starts, sizes)
            if program.competing:
                self.tight[problems] = nu >= -1 - top
                nu = np.maximum(nu, -1 - top)
            else:
                self.tight[problems] = True
            s -= np.repeat(nu, sizes)
            np.maximum(s, 0.0, out=self.x[cells])
            totals += program.rows.times(prior * self.x[cells], cells)
        return sides.bound - sides.sign * totals[sides.row]

    def weights(self, z: Floats) -> Floats:
        """q(z), ``[C]``."""
        self.gradient(z)
        return self.program.prior * self.x

    def hessian(self, chosen: Bools) -> Floats:
        """The Hessian at the last z, of the chosen sides: ``[m, m]``."""
        program, sides = self.program, self.program.sides
        row, sign = sides.row[chosen], sides.sign[chosen]
        out = np.zeros((len(row), len(row)))
        for problems, cells in program.blocks():
            prior, starts, _ = self._part(problems, cells)
            held = prior * (self.x[cells] > 0)
            a = np.stack([program.rows.row(int(index), cells) for index in row])
            weighted = a * held
            out += weighted @ a.T
            sums = np.add.reduceat(weighted, starts, axis=1)
            mass = np.add.reduceat(held, starts)
            out -= (sums * np.divide(self.tight[problems], mass, out=np.zeros_like(mass), where=mass > 0)) @ sums.T
        return out * sign * sign[:, None]

    def farkas(self, z: Floats) -> tuple[float, float]:
        """sum_n max_k (-A^T z)_k + bound . z, and the size of its terms."""
        program, values = self.program, self._row_values(z)
        total = size = 0.0
        for problems, cells in program.blocks():
            highest = np.maximum.reduceat(-program.rows.adjoint(values, cells), self._part(problems, cells)[1])
            if program.competing:
                highest = np.maximum(highest, 0.0)
            total += float(highest.sum())
            size += float(np.abs(highest).sum())
        terms = program.sides.bound * z
        return total + float(terms.sum()), size + float(np.abs(terms).sum())

    def _row_values(self, z: Floats) -> Floats:
        sides = self.program.sides
        return np.bincount(sides.row, weights=sides.sign * z, minlength=len(self.program.rows))

    def _part(self, problems: slice, cells: slice) -> tuple[Floats, np.ndarray, np.ndarray]:
        program = self.program
        return program.prior[cells], program.starts[problems] - cells.start, program.sizes[problems]


def _root(s: Floats, prior: Floats, inverse_prior: Floats, starts: np.ndarray, sizes: np.ndarray) -> Floats:
    """nu with sum_k p_k (s_k - nu)_+ = 1 for every problem, ``[n]``; the highest s of each is 0.

    The left side is convex in nu, so Newton's method from the left climbs to the root, and each step only drops
    candidates: it ends, exactly, when none is dropped. No q_k is above 1, so s_k - 1/p_k is on the left for every k.
    """
    nu = np.maximum.reduceat(s - inverse_prior, starts)
    active = s > np.repeat(nu, sizes)
    count = np.count_nonzero(active)
    while True:
        held = prior * active
        nu = (np.add.reduceat(held * s, starts) - 1) / np.add.reduceat(held, starts)
        active &= s > np.repeat(nu, sizes)
        before, count = count, np.count_nonzero(active)
        if count == before:
            return nu


def minimised(program: Program, gain: Floats, z: Floats) -> tuple[Floats, Floats]:
    """z that minimises D, starting from z, and q / p there.

    A few problems with a tiny tau are next to a linear program: D is a polyhedron whose flat faces tell Newton's method
    nothing. There the minimum is followed from large tau down, along which z is piecewise linear.

    Raises:
        InfeasibleError: D has no minimum.
        NotSolvedError: rounding, or the number of steps, ended it too early.
    """
    try:
        return _newton(program, gain, z)
    except NotSolvedError:
        z = np.zeros_like(z)
    for exponent in range(-_FOLLOWED, 1):
        z, x = _newton(program, gain * 2.0**exponent, 2 * z)
    return z, x


def _newton(program: Program, gain: Floats, z: Floats) -> tuple[Floats, Floats]:
    dual, sides = Dual(program, gain), program.sides
    g = dual.gradient(z)
    best, stalled = math.inf, 0
    for _ in range(_STEPS):
        residual = _residual(sides, z, g)
        stalled = 0 if residual < 0.5 * best else stalled + 1
        best = min(best, residual)
        if residual <= _TARGET or (stalled >= 3 and residual <= GOOD / 2):
            return z, dual.x
        if z.any():
            value, size = dual.farkas(z)
            if value < -_CERTAIN * size:
                raise InfeasibleError(z)
        chosen = sides.free | (z > 0) | (g < 0)
        hessian = dual.hessian(chosen)
        hessian[np.diag_indices_from(hessian)] += _DAMPING * min(1.0, residual) * program.total
        target = _bounded_quadratic(hessian, g[chosen] - hessian @ z[chosen], sides.free[chosen], z[chosen])
        step = np.zeros_like(z)
        step[chosen] = target - z[chosen]
        slope = float(g @ step)
        if not slope < 0:
            break
        z, g = _along(dual, z, step, slope)
    if _residual(sides, z, g) <= GOOD / 2:
        return z, dual.x
    raise NotSolvedError(f"the dual stopped at a relative residual of {_residual(sides, z, g):.1e}")


def _residual(sides: Sides, z: Floats, g: Floats) -> float:
    """How far z is from the minimum: violations, and slack that has a multiplier, relative to the bounds' scale."""
    relative = g / sides.scale
    return float(np.max(np.abs(np.where(sides.free, relative, np.minimum(relative, z))), initial=0.0))


def _along(dual: Dual, z: Floats, step: Floats, slope: float) -> tuple[Floats, Floats]:
    """A point along the step where D falls at most half as steeply as at z, and its gradient; the dual is left there.

    The full step is tried first. D is convex, so its slope along the step grows: too steep a fall and the step grows as
    far as the bounds of z let it, a rise and the point is between.
    """
    falling = (step < 0) & ~dual.program.sides.free
    reach = float(np.min(z[falling] / -step[falling], initial=math.inf))

    def at(t: float) -> tuple[Floats, Floats, float]:
        # The step that ends on a bound shall end on it exactly.
        point = z + t * step
        point[falling] = np.where(point[falling] < 1e-15 * z[falling], 0.0, point[falling])
        gradient = dual.gradient(point)
        return point, gradient, float(gradient @ step)

    low, low_slope, t, line = 0.0, slope, 1.0, None
    for _ in range(_SEARCHES):
        point, gradient, here = at(t)
        if abs(here) <= _FLAT * -slope or (here < 0 and t >= reach):
            break
        if line is not None:
            line.narrow(t, here)
        elif here > 0:
            line = _Illinois(low, low_slope, t, here)
        else:
            low, low_slope = t, here
        t = min(4 * t, reach) if line is None else line.guess(0.02)
    return point, gradient


def _bounded_quadratic(hessian: Floats, linear: Floats, free: Bools, start: Floats) -> Floats:
    """argmin of w.Hw/2 + linear.w, w >= 0 but where ``free``, by active sets (Lawson and Hanson) from ``start``."""
    w = start.copy()
    held = free | (w > 0)
    tolerance = 1e-14 * (np.abs(linear) + np.abs(hessian) @ np.abs(w))
    for _ in range(10 * len(w) + 10):
        while held.any():
            inner = np.zeros_like(w)
            inner[held] = np.linalg.solve(hessian[np.ix_(held, held)], -linear[held])
            crossed = held & ~free & (inner <= 0)
            if not crossed.any():
                w = inner
                break
            shares = w[crossed] / (w[crossed] - inner[crossed])
            w = w + shares.min() * (inner - w)
            dropped = np.flatnonzero(crossed)[shares <= shares.min()]
            w[dropped], held[dropped] = 0.0, False
        slope = hessian @ w + linear
        slope[held] = 0.0
        lowest = int(np.argmin(slope))
        if slope[lowest] >= -tolerance[lowest]:
            break
        held[lowest] = True
    return w


def within_radius(program: Program) -> tuple[Floats, Floats]:
    """z and 1/tau of all problems, ``[N]``: the largest 1/tau whose solution has a mean chi2 within the radius.

    For given supports q is affine in 1/tau, so the mean chi2 is a quadratic in it, and it never falls.
    """
    most = 1 / smallest_tau(program)
    z, at = np.zeros(len(program.sides)), 0.0

    def excess(theta: float) -> float:
        """sqrt(mean chi2 / radius) - 1 at 1/tau = theta: nearly linear in theta."""
        nonlocal z, at
        # From one theta to the next, multipliers in units of the energies change least.
        start = z * (theta / at) if theta and at else z
        z, x = minimised(program, program.gain(np.full(program.n_problems, theta)), start)
        at = theta
        return math.sqrt(float(chi2_of_problems(program, program.prior * x).mean()) / program.radius) - 1

    low, low_value = 0.0, excess(0.0)
    if low_value > GOOD:
        raise InfeasibleError(z, least=program.radius * (1 + low_value) ** 2)
    high = _FIRST_THETA * most
    while (high_value := excess(high)) < 0 and high < most:
        low, low_value, high = high, high_value, min(4 * high, most)
    value, line = high_value, _Illinois(low, low_value, high, high_value)
    for _ in range(_RADIUS_STEPS):
        if (value <= 0 and at == most) or abs(value) <= GOOD / 20 or line.closed:
            break
        value = excess(line.guess(0.001))
        line.narrow(at, value)
    return z, np.full(program.n_problems, at)


class _Illinois:
    """A root between low and high of a function that grows there: false position that halves the end that stays."""

    def __init__(self, low: float, low_value: float, high: float, high_value: float) -> None:
        self.low, self.low_value, self.high, self.high_value = low, low_value, high, high_value
        self.last = 0

    @property
    def closed(self) -> bool:
        """No number is left between."""
        return self.high - self.low <= 4e-16 * self.high

    def guess(self, margin: float) -> float:
        """Where the secant is 0, kept off the ends by this share of the interval."""
        t = (self.low * self.high_value - self.high * self.low_value) / (self.high_value - self.low_value)
        edge = margin * (self.high - self.low)
        return min(max(t, self.low + edge), self.high - edge)

    def narrow(self, t: float, value: float) -> None:
        """Take a point of the interval and its value in."""
        if value < 0:
            self.low, self.low_value = t, value
            self.high_value *= 0.5 if self.last < 0 else 1.0
            self.last = -1
        else:
            self.high, self.high_value = t, value
            self.low_value *= 0.5 if self.last > 0 else 1.0
            self.last = 1
