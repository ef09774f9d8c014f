"""Selection under constraints by its dual: a few multipliers outside, closed forms inside; and the door to all of it.

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
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lark_fast.kernels.chi2 import chi2_weights
from lark_fast.selection.constraints import Bools, Constraints, Floats, Sides
from lark_fast.selection.program import (
    Candidates,
    NotSolvedError,
    Program,
    Solution,
    chi2_of_problems,
    judged,
    pose,
    same_size,
    smallest_tau,
    solve_with_cvxpy,
    without_dust,
)

SOLVERS = ("auto", "dual", "cvxpy")

_TARGET = 1e-12  # of the relative residual, if rounding lets it get there
_GOOD = 1e-9  # what a solution must have
_GENERAL_GOOD = 1e-6  # what one of the general solver must have
_STEPS = 100
_FOLLOWED = 14  # halvings of 1/tau
_SEARCHES = 60
_FLAT = 0.5  # a line search may leave this share of the slope
_DAMPING = 1e-3  # per unit of relative residual, of a Hessian's natural size
_CERTAIN = 1e-10  # how far below 0, relative to its terms, Farkas' sum must be
_RADIUS_STEPS = 100
_FIRST_THETA = 1e-6  # of the largest 1/tau: about one over the spread of the energies
_FILTERED = 12  # fighting constraints are told apart one by one up to this many
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstrainedWeights:
    """The weights of a selection under constraints.

    Attributes:
        weight: ``[R]``, 0 off the support and where there is no candidate.
        multipliers: what a unit more of each bound is worth in the objective, by name: "budget.tokens" a token,
            "groups.teacher.a max" a unit of weight. The objective is sum <q, e> / tau_n - chi2 / 2 or, under a
            chi2_radius, sum <q, e>, and "chi2_radius" is then worth N tau / 2 a unit.
        tau: the tau that all problems share, infinite where q = p; None where each has its own, of a budget.
        solver: "closed form", "dual" or "cvxpy ..."
        residual: largest violation of the optimality conditions (``program.kkt_residuals``).
        lines: the constraints for a reader, a line each.
    """

    weight: Floats
    multipliers: dict[str, float]
    tau: float | None
    solver: str
    residual: float
    lines: tuple[str, ...]


def constrained_weights(
    candidates: Candidates,
    constraints: Constraints,
    *,
    budget: int | None = None,
    tau: float | None = None,
    solver: str = "auto",
) -> ConstrainedWeights:
    """Weights of the candidates that maximise the chi-squared objective under constraints over all problems.

    Args:
        candidates: what to choose from.
        constraints: what a file asks for.
        budget: candidates a problem (3 where nothing else sets tau); without a binding constraint the weights are
            those of ``chi2_weights(energies less the length penalty, budget)``.
        tau: strength of the penalty for all problems, in the units of the energies.
        solver: "dual" or "cvxpy" have this one do it; "auto" takes the closed form where no constraint binds, else the
            dual, else, where it does not converge, cvxpy.

    Raises:
        UserError: constraints that do not go together, or cannot hold together; no solver converged.
        ValueError: arrays of different lengths, infinite energies, no candidate.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    program = pose(candidates, constraints, budget=budget, tau=tau)
    solution = None
    if solver == "auto" and program.radius is None and not program.competing:
        solution = _closed_form(program)
    if solution is None:
        try:
            solution = _general(program) if solver == "cvxpy" else _dual(program)
        except _InfeasibleError as error:
            raise constraints.error(_conflict(program, error)) from None
        except NotSolvedError as error:
            if solver != "auto":
                raise constraints.error(f"{solver} found no solution ({error}); loosen the constraints") from error
    if solution is None:
        try:
            solution = _general(program)
        except NotSolvedError as error:
            raise constraints.error(
                f"no solver converged ({error}); the constraints are next to contradictory: loosen them a little"
            ) from error
    weight = np.zeros(len(candidates.energies))
    weight[program.place] = solution.weight
    multipliers, shared = _multipliers(program, solution)
    return ConstrainedWeights(
        weight=weight,
        multipliers=multipliers,
        tau=shared,
        solver=solution.solver,
        residual=solution.residual,
        lines=_lines(program, solution, multipliers),
    )


class _InfeasibleError(Exception):
    """No selection satisfies the sides: ``z`` proves it. ``least``: if it is the radius, the least mean chi2."""

    def __init__(self, z: Floats, least: float | None = None) -> None:
        super().__init__("infeasible")
        self.z, self.least = z, least


def _closed_form(program: Program) -> Solution | None:
    """The solution without the sides, if it satisfies them."""
    weight = program.prior.copy()
    if program.rate.any():
        how = {"budget": program.budget} if program.tau is None else {"tau": program.tau}
        for _, cells in same_size(program.starts, program.sizes):
            prior = None if program.uniform else program.prior[cells]
            weight[cells] = chi2_weights(program.energy[cells], prior=prior, **how)
    if program.tau is not None:
        weight = without_dust(program, weight)
    sides = program.sides
    if len(sides):
        gap = sides.sign * program.rows.times(weight, slice(0, len(weight)))[sides.row] - sides.bound
        if (np.where(sides.free, np.abs(gap), gap) > _GOOD * sides.scale).any():
            return None
    solution = Solution(
        weight=weight, z=np.zeros(len(sides)), rate=program.rate, solver="closed form", residual=math.nan
    )
    return judged(program, solution)


def _general(program: Program) -> Solution:
    solution = judged(program, solve_with_cvxpy(program))
    if not solution.residual <= _GENERAL_GOOD:
        raise NotSolvedError(f"cvxpy left a residual of {solution.residual:.1e}")
    return solution


def _dual(program: Program) -> Solution:
    if program.radius is not None:
        z, rate = _within_radius(program)
    else:
        z, rate = _minimised(program, program.gain(), np.zeros(len(program.sides)))[0], program.rate
    weight = without_dust(program, _Dual(program, program.gain(rate)).weights(z))
    solution = judged(program, Solution(weight=weight, z=z, rate=rate, solver="dual", residual=math.nan))
    if not solution.residual <= _GOOD:
        raise NotSolvedError(f"the dual left a residual of {solution.residual:.1e}")
    return solution


class _Dual:
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


def _minimised(program: Program, gain: Floats, z: Floats) -> tuple[Floats, Floats]:
    """z that minimises D, starting from z, and q / p there.

    A few problems with a tiny tau are next to a linear program: D is a polyhedron whose flat faces tell Newton's method
    nothing. There the minimum is followed from large tau down, along which z is piecewise linear.

    Raises:
        _InfeasibleError: D has no minimum.
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
    dual, sides = _Dual(program, gain), program.sides
    g = dual.gradient(z)
    best, stalled = math.inf, 0
    for _ in range(_STEPS):
        residual = _residual(sides, z, g)
        stalled = 0 if residual < 0.5 * best else stalled + 1
        best = min(best, residual)
        if residual <= _TARGET or (stalled >= 3 and residual <= _GOOD / 10):
            return z, dual.x
        if z.any():
            value, size = dual.farkas(z)
            if value < -_CERTAIN * size:
                raise _InfeasibleError(z)
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
    if _residual(sides, z, g) <= _GOOD / 10:
        return z, dual.x
    raise NotSolvedError(f"the dual stopped at a relative residual of {_residual(sides, z, g):.1e}")


def _residual(sides: Sides, z: Floats, g: Floats) -> float:
    """How far z is from the minimum: violations, and slack that has a multiplier, relative to the bounds' scale."""
    relative = g / sides.scale
    return float(np.max(np.abs(np.where(sides.free, relative, np.minimum(relative, z))), initial=0.0))


def _along(dual: _Dual, z: Floats, step: Floats, slope: float) -> tuple[Floats, Floats]:
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


def _within_radius(program: Program) -> tuple[Floats, Floats]:
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
        z, x = _minimised(program, program.gain(np.full(program.n_problems, theta)), start)
        at = theta
        return math.sqrt(float(chi2_of_problems(program, program.prior * x).mean()) / program.radius) - 1

    low, low_value = 0.0, excess(0.0)
    if low_value > _GOOD:
        raise _InfeasibleError(z, least=program.radius * (1 + low_value) ** 2)
    high = _FIRST_THETA * most
    while (high_value := excess(high)) < 0 and high < most:
        low, low_value, high = high, high_value, min(4 * high, most)
    value, line = high_value, _Illinois(low, low_value, high, high_value)
    for _ in range(_RADIUS_STEPS):
        if (value <= 0 and at == most) or abs(value) <= _GOOD / 100 or line.closed:
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


def _conflict(program: Program, error: _InfeasibleError) -> str:
    """Which constraints cannot hold together: a set that can hold once any of it is left out, and what would do."""
    sides, z = program.sides, np.abs(error.z)
    fighting = z > 1e-9 * z.max(initial=0.0)
    if error.least is not None:
        fighting = _irreducible(fighting, lambda chosen: _least_chi2(program, chosen) > program.radius * (1 + _GOOD))
        texts = [f"chi2_radius {program.radius:g}", *(sides.texts[c] for c in np.flatnonzero(fighting))]
        least = f"with the rest kept, the mean chi2 is at least {error.least * (1 + 1e-6):.6g}"
        return f"{_cannot_hold(texts)}: {least}; loosen one of them"
    fighting = _irreducible(fighting, lambda chosen: not _feasible(program, chosen))
    members = np.flatnonzero(fighting)
    words = _cannot_hold([sides.texts[c] for c in members])
    # The total is what shares are taken of, so what would do is said of another one.
    bounded = [c for c in members if sides.names[c] != "budget.samples"]
    if len(members) > _FILTERED or not bounded:
        return f"{words}; loosen some of them"
    others = fighting.copy()
    others[bounded[0]] = False
    reach = _reach(program, int(bounded[0]), others, float(error.z[bounded[0]]))
    if len(members) == 1:
        return f"{words}: {reach}; {'lower' if sides.sign[members[0]] < 0 else 'raise'} it"
    return f"{words}{': with the rest kept, ' + reach if reach else ''}; loosen one of them"


def _cannot_hold(texts: list[str]) -> str:
    if len(texts) == 1:
        return f"{texts[0]} cannot hold"
    if len(texts) > _SHOWN:
        return f"{', '.join(texts[:_SHOWN])} and {len(texts) - _SHOWN:,} more cannot all hold"
    return f"{', '.join(texts[:-1])} and {texts[-1]} cannot {'both' if len(texts) == 2 else 'all'} hold"


def _irreducible(fighting: Bools, still_fights: Callable[[Bools], bool]) -> Bools:
    """What is left when all that the fight does not need has been taken out, one by one (deletion filter)."""
    if np.count_nonzero(fighting) > _FILTERED:
        return fighting
    for c in np.flatnonzero(fighting):
        without = fighting.copy()
        without[c] = False
        if still_fights(without):
            fighting = without
    return fighting


def _feasible(program: Program, chosen: Bools) -> bool:
    part = replace(program, sides=program.sides.only(chosen))
    try:
        _minimised(part, np.zeros_like(program.energy), np.zeros(len(part.sides)))
    except _InfeasibleError:
        return False
    except NotSolvedError:
        return True
    return True


def _least_chi2(program: Program, chosen: Bools) -> float:
    part = replace(program, sides=program.sides.only(chosen))
    try:
        _, x = _minimised(part, np.zeros_like(program.energy), np.zeros(len(part.sides)))
    except (_InfeasibleError, NotSolvedError):
        return 0.0
    return float(chi2_of_problems(program, program.prior * x).mean())


def _reach(program: Program, side: int, others: Bools, z: float) -> str:
    """How far a side could go with the others kept, in words; empty where that was not found."""
    sides = program.sides
    sign = float(sides.sign[side]) * (1.0 if z > 0 else -1.0)
    a = sign * program.rows.row(int(sides.row[side]), slice(0, len(program.energy)))
    if others.any():
        # For tau small enough the penalty only chooses among the maximisers of the linear objective.
        part = replace(program, sides=sides.only(others))
        gain = -a * 1e4 / (float(np.ptp(a)) or 1.0)
        if not program.competing:
            gain -= np.repeat(np.maximum.reduceat(gain, program.starts), program.sizes)
        try:
            _, x = _minimised(part, gain, np.zeros(len(part.sides)))
        except (_InfeasibleError, NotSolvedError):
            return ""
        value = float(a @ (program.prior * x))
    else:
        lowest = np.sort(np.minimum.reduceat(a, program.starts))
        whole = int(program.total)
        value = float(lowest[:whole].sum())
        if whole < len(lowest):
            value += (program.total - whole) * float(lowest[whole])
    value *= sign
    if sides.names[side] == "budget.tokens":
        return f"no selection has fewer than {math.ceil(value * sides.unit[side] - 1e-6):,} tokens"
    # Rounded to what can be reached.
    share = 1e6 * value / program.total
    words = (
        f"less than {math.ceil(share - 1e-3) / 1e6:g}" if sign > 0 else f"more than {math.floor(share + 1e-3) / 1e6:g}"
    )
    return f"no selection gives {sides.names[side].rsplit(' ', 1)[0].removesuffix(' min =')} {words}"


def _multipliers(program: Program, solution: Solution) -> tuple[dict[str, float], float | None]:
    """The multipliers by name, and the shared tau."""
    sides, tau = program.sides, program.tau
    values = solution.z / sides.unit
    found = {}
    if program.radius is not None:
        rate = float(solution.rate[0])
        tau = 1 / rate if rate else math.inf
        mean = float(chi2_of_problems(program, solution.weight).mean())
        binding = mean >= program.radius * (1 - 1e-6)
        found["chi2_radius"] = program.n_problems * tau / 2 if binding else 0.0
        values = values * tau if rate else values
    return dict(zip(sides.names, values.tolist(), strict=True)) | found, tau


def _lines(program: Program, solution: Solution, multipliers: dict[str, float]) -> tuple[str, ...]:
    sides = program.sides
    totals = program.rows.times(solution.weight, slice(0, len(solution.weight)))[sides.row]
    said, loose = [], 0
    if program.radius is not None:
        mean = float(chi2_of_problems(program, solution.weight).mean())
        said.append(
            f"chi2_radius: mean chi2 {mean:.6g} of at most {program.radius:g}, "
            + (f"multiplier {multipliers['chi2_radius']:.3g}" if multipliers["chi2_radius"] else "which does not bind")
        )
    for c, name in enumerate(sides.names):
        multiplier = multipliers[name]
        ending = f"multiplier {multiplier:.3g}" if multiplier else "which does not bind"
        if name == "budget.samples":
            said.append(f"{name}: {totals[c]:,.6g} of {sides.bound[c]:,.6g}, {ending}")
        elif name == "budget.tokens":
            unit = sides.unit[c]
            said.append(f"{name}: {totals[c] * unit:,.0f} of at most {sides.bound[c] * unit:,.0f}, {ending}")
        elif multiplier and len(said) < _SHOWN:
            said.append(f"{sides.texts[c]}: {totals[c] / program.total:.2%} of the weight, {ending}")
        else:
            loose += 1
    if loose:
        said.append(f"{loose:,} other bounds on shares hold" if loose > 1 else "the other bound on a share holds")
    return tuple(said)
