"""Selection under constraints as one convex program: posed, stated for a general solver, and judged.

With candidates i of problems n, energies e, prior p and tau_n > 0,

    max_q  sum_n [ <q_n, e_n> / tau_n  -  (1/2) chi2(q_n || p_n) ]     sum of q_n = 1,  q >= 0,  l <= A q <= u

where chi2(q || p) = sum_k (q_k - p_k)^2 / p_k. With ``samples`` the problems compete instead: the sum of q_n is at most
1, and that of all q is given. Under a ``chi2_radius`` R the objective is sum <q, e> and the mean of chi2(q_n || p_n) is
at most R; its multiplier is N/2 times a tau that all problems share, so it is the program above with an unknown tau.

With y = q / sqrt(p) the first objective is -(1/2) |y - t|^2 and a constant, t = sqrt(p) (1 + e / tau_n): the solution
is the projection of t onto a polyhedron. In this form a general solver is good to 1e-10, in the other to 1e-4.

Where no constraint binds, this falls apart into the problems of ``lark_fast.kernels.chi2``. A budget B gives each
problem its own tau_n = T_B, with T_m as defined there. Where the top B tie with the next, the smallest T_m > 0 with
m >= B has the same solution, and where there is none, q = p for every tau: then tau_n is infinite and the energies do
not count.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.kernels.chi2 import DEFAULT_BUDGET, TIE_SHARE_OF_SPREAD, critical_taus
from lark_fast.selection.blocks import same_size
from lark_fast.selection.constraints import (
    NO_VALUE,
    Bools,
    Constraints,
    Floats,
    Groups,
    Ints,
    Rows,
    Sides,
    linear_constraints,
)

# Candidates are worked on in blocks of about this many: the temporaries stay in the cache.
BLOCK_CELLS = 1 << 15

_SMALLEST_TAU = 1e-6  # in units of the largest spread of a problem
_LARGEST_GAIN = 1e150  # a tiny tau shall not leave the range of float64
_RADIUS_STEPS = 12
_RADIUS_GOOD = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a selection chooses from, ``[R]`` each.

    Attributes:
        problem: a number that the candidates of one problem share.
        energies: g_hat, or what else is to be large; NaN where there is no candidate.
        n_tokens: scored tokens, not negative.
        groups: name -> (codes ``[R]``, the values' names): a candidate has the value names[code], none where it is -1.
        prior: above 0, normalised over each problem's candidates; a candidate with 0 is none. None is uniform.
    """

    problem: NDArray[Any]
    energies: Floats
    n_tokens: NDArray[Any]
    groups: Groups = field(default_factory=dict)
    prior: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The program over the ``C`` candidates that count, a problem's side by side.

    Attributes:
        place: ``[C]`` which of the given candidates each is.
        starts: ``[N]`` where each problem begins.
        sizes: ``[N]`` its candidates.
        energy: ``[C]`` less the length penalty.
        prior: ``[C]`` sums to 1 in each problem.
        uniform: the prior is.
        rate: ``[N]`` 1/tau_n, 0 where tau_n is infinite; all 1 under a radius.
        tau: the tau that all problems share, None with a budget or a radius.
        budget: candidates a problem where each has its own tau_n.
        total: the sum of all weights.
        competing: problems have a weight of at most 1 instead of exactly 1.
        radius: the mean chi2 divergence allowed, None where tau is given.
    """

    place: Ints
    starts: Ints
    sizes: Ints
    energy: Floats
    prior: Floats
    uniform: bool
    rate: Floats
    tau: float | None
    budget: int | None
    total: float
    competing: bool
    radius: float | None
    rows: Rows
    sides: Sides

    @property
    def n_problems(self) -> int:
        """How many problems have a candidate."""
        return len(self.starts)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """(problems, cells) in pieces that fit the cache."""
        first, last = 0, self.n_problems
        while first < last:
            stop = int(np.searchsorted(self.starts, self.starts[first] + BLOCK_CELLS, side="left"))
            stop = max(stop, first + 1)
            end = int(self.starts[stop]) if stop < last else len(self.energy)
            yield slice(first, stop), slice(int(self.starts[first]), end)
            first = stop

    def gain(self, rate: Floats | None = None) -> Floats:
        """energy / tau_n, ``[C]``, for another 1/tau_n if given; less the highest of the problem, unless they compete.

        Where they do not, a constant for a problem changes nothing, and small differences shall not drown in it.
        """
        rate = np.repeat(self.rate if rate is None else rate, self.sizes)
        with np.errstate(over="ignore"):
            gain = self.energy
            if not self.competing:
                gain = gain - np.repeat(np.maximum.reduceat(gain, self.starts), self.sizes)
            return np.clip(gain * rate, -_LARGEST_GAIN, _LARGEST_GAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What a solver found."""

    weight: Floats  # [C]
    z: Floats  # [M] multipliers of the sides, for the objective with tau_n
    rate: Floats  # [N] 1/tau_n: the program's own, or the one that the radius came to
    solver: str
    residual: float  # largest of ``kkt_residuals``


def pose(
    candidates: Candidates, constraints: Constraints, *, budget: int | None = None, tau: float | None = None
) -> Program:
    """The program for these candidates.

    Args:
        candidates: what to choose from; their energies are finite or NaN.
        constraints: what a file asks for.
        budget: candidates a problem; 3 where neither it, nor tau, nor a constraint that sets tau is given.
        tau: strength of the penalty, for all problems, in the units of the energies.

    Raises:
        UserError: combinations that cannot be; a share of a value that no candidate has; minima that sum to more than
            1; rows or samples that are out of reach.
        ValueError: arrays of different lengths, infinite energies, no candidate, a group that was not given.
    """
    constraints.refuse_combination(budget=budget, tau=tau)
    energies, tokens, prior = _checked(candidates, budget, tau)
    place, starts, sizes = _by_problem(np.asarray(candidates.problem), ~np.isnan(energies) & (prior > 0))
    prior = prior[place] / np.repeat(np.add.reduceat(prior[place], starts), sizes)
    tokens = tokens[place]
    with np.errstate(over="ignore"):
        energy = energies[place] - constraints.length_penalty * tokens
    if not np.isfinite(energy).all():
        raise constraints.error(f"length_penalty {constraints.length_penalty:g}: energies overflow; lower it")
    competing = constraints.samples is not None
    if constraints.rows is not None or constraints.row_tokens is not None:
        tau = _tau_of_rows(energy, prior, tokens, starts, sizes, constraints)
    if constraints.chi2_radius is not None:
        rate = np.ones(len(starts))
    elif tau is not None:
        rate = np.full(len(starts), 1 / tau)
    else:
        budget = DEFAULT_BUDGET if budget is None else budget
        rate = 1 / _taus_of_budget(energy, prior, starts, sizes, budget)
    total = float(len(starts)) if constraints.samples is None else constraints.samples
    if total > len(starts):
        raise constraints.error(
            f"budget.samples {total:g}: more than the {len(starts):,} problems that have candidates, and each has a "
            f"weight of at most 1; give at most {len(starts)}"
        )
    groups = {name: (np.asarray(codes)[place], names) for name, (codes, names) in candidates.groups.items()}
    rows, sides = linear_constraints(constraints, groups, tokens, total)
    return Program(
        place=place,
        starts=starts,
        sizes=sizes,
        energy=energy,
        prior=prior,
        uniform=candidates.prior is None,
        rate=rate,
        tau=tau,
        budget=None if tau is not None or constraints.chi2_radius is not None else budget,
        total=total,
        competing=competing,
        radius=constraints.chi2_radius,
        rows=rows,
        sides=sides,
    )


def _checked(candidates: Candidates, budget: int | None, tau: float | None) -> tuple[Floats, Floats, Floats]:
    """Energies, tokens and priors, ``[R]`` float64 each."""
    energies = np.asarray(candidates.energies, dtype=np.float64)
    tokens = np.asarray(candidates.n_tokens, dtype=np.float64)
    prior = np.ones(len(energies)) if candidates.prior is None else np.asarray(candidates.prior, dtype=np.float64)
    arrays = {"problem": np.asarray(candidates.problem), "n_tokens": tokens, "prior": prior}
    arrays |= {f"groups[{name!r}]": np.asarray(codes) for name, (codes, _) in candidates.groups.items()}
    for name, array in arrays.items():
        if array.shape != energies.shape or array.ndim != 1:
            raise ValueError(f"{name} must have the shape (R,) of the energies; got {array.shape}, {energies.shape}")
    valid = ~np.isnan(energies)
    if not (valid & ~(prior == 0)).any():
        raise ValueError("energies: all are NaN, or where the prior is 0, so there is no candidate")
    for name, (codes, names) in candidates.groups.items():
        wrong = ~((np.asarray(codes) >= NO_VALUE) & (np.asarray(codes) < len(names)))
        if wrong.any():
            index = int(np.argmax(wrong))
            raise ValueError(f"groups[{name!r}]: candidate {index} has the code {codes[index]} of {len(names)} names")
    for name, array, wrong in (
        ("energies", energies, np.isinf(energies)),
        ("n_tokens", tokens, ~(np.isfinite(tokens) & (tokens >= 0))),
        ("prior", prior, valid & ~(np.isfinite(prior) & (prior >= 0))),
    ):
        if wrong.any():
            index = int(np.argmax(wrong))
            raise ValueError(f"{name}: candidate {index} is {array[index]}; must be finite, and only energies below 0")
    if budget is not None and budget < 1:
        raise ValueError(f"budget must be at least 1; got {budget}")
    if tau is not None and not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau must be a finite number above 0; got {tau!r}")
    return energies, tokens, np.where(valid, prior, 0.0)


def _by_problem(problem: NDArray[Any], valid: Bools) -> tuple[Ints, Ints, Ints]:
    """The valid candidates, those of a problem side by side, and where each problem starts and how many it has."""
    place = np.flatnonzero(valid)
    of = problem[place]
    if np.any(of[1:] < of[:-1]):
        order = np.argsort(of, kind="stable")
        place, of = place[order], of[order]
    starts = np.flatnonzero(np.concatenate([[True], of[1:] != of[:-1]]))
    return place, starts, np.diff(np.append(starts, len(of)))


def _critical_taus(energy: Floats, prior: Floats) -> tuple[Floats, Ints]:
    """T_1 ... T_K, ``[n, K]``, with T_K infinite, and the candidates from the highest energy down.

    A gap between neighbours below the share of the spread at which energies tie counts as none.
    """
    order = np.argsort(-energy, axis=1, kind="stable")
    ranked = np.take_along_axis(energy, order, axis=1)
    mass = np.cumsum(np.take_along_axis(prior, order, axis=1), axis=1)
    tie = TIE_SHARE_OF_SPREAD * (ranked[:, :1] - ranked[:, -1:])
    return np.pad(critical_taus(ranked, mass, tie), ((0, 0), (0, 1)), constant_values=np.inf), order


def _taus_of_budget(energy: Floats, prior: Floats, starts: Ints, sizes: Ints, budget: int) -> Floats:
    """tau_n, ``[N]``."""
    out = np.full(len(starts), np.inf)
    for problems, cells in same_size(starts, sizes, BLOCK_CELLS):
        if cells.shape[1] <= budget:
            continue
        taus = _critical_taus(energy[cells], prior[cells])[0][:, budget - 1 :]
        first = np.argmax(taus > 0, axis=1)
        out[problems] = taus[np.arange(len(taus)), first]
    return out


def _tau_of_rows(
    energy: Floats, prior: Floats, tokens: Floats, starts: Ints, sizes: Ints, constraints: Constraints
) -> float:
    """The largest shared tau whose selection keeps to ``rows`` and ``row_tokens``; infinite where everything may stay.

    Candidate m of a problem is in the selection when tau > T_{m-1}, so these thresholds, sorted, are all that can be.
    """
    threshold = np.empty_like(energy)
    for _, cells in same_size(starts, sizes, BLOCK_CELLS):
        taus, order = _critical_taus(energy[cells], prior[cells])
        ranked = np.concatenate([np.zeros((len(taus), 1)), taus[:, :-1]], axis=1)
        threshold[np.take_along_axis(cells, order, axis=1)] = ranked
    order = np.argsort(threshold)
    ranked = threshold[order]
    tau = math.inf
    for name, limit, amounts in (
        ("rows", constraints.rows, np.ones(len(order))),
        ("row_tokens", constraints.row_tokens, tokens),
    ):
        if limit is None:
            continue
        reached = np.cumsum(amounts[order])
        first_beyond = int(np.searchsorted(reached, limit, side="right"))
        if first_beyond == len(order):
            continue
        if ranked[first_beyond] == 0:
            least = reached[np.searchsorted(ranked, 0.0, side="right") - 1]
            what = "one row a problem" if name == "rows" else "the tokens of one row a problem"
            raise constraints.error(f"budget.{name} {limit:g}: below {what} (ties included); give at least {least:.0f}")
        tau = min(tau, float(ranked[first_beyond]))
    return tau


def chi2_of_problems(program: Program, weight: Floats) -> Floats:
    """chi2(q_n || p_n) of every problem: ``[C]`` -> ``[N]``."""
    return np.add.reduceat(np.square(weight - program.prior) / program.prior, program.starts)


def kkt_residuals(program: Program, weight: Floats, z: Floats, rate: Floats) -> dict[str, float]:
    """How far weights ``[C]`` and multipliers ``[M]`` are from optimality; all are 0 at the solution.

    ``problem``: weight of a problem beyond its sum. ``constraint``: violation of a side, relative to its scale.
    ``sign``: a multiplier below 0. ``slack``: the lesser of a side's multiplier and its relative slack.
    ``stationary``: largest weight that is not p (s - nu)_+, s = 1 + e / tau_n - A^T z, relative to max |s|.
    ``radius``: mean chi2 beyond its bound, relative to it.
    """
    sides, everything = program.sides, slice(0, len(weight))
    mass = np.add.reduceat(weight, program.starts)
    excess = mass - 1
    found = {"problem": float((np.maximum(excess, 0) if program.competing else np.abs(excess)).max())}
    if len(sides):
        gap = (sides.sign * program.rows.times(weight, everything)[sides.row] - sides.bound) / sides.scale
        bounded = ~sides.free
        found["constraint"] = float(np.where(sides.free, np.abs(gap), np.maximum(gap, 0)).max())
        found["sign"] = float(np.max(-z[bounded], initial=0.0))
        found["slack"] = float(np.max(np.minimum(z[bounded], np.maximum(-gap[bounded], 0)), initial=0.0))
    values = np.bincount(sides.row, weights=sides.sign * z, minlength=len(program.rows))
    s = 1 + program.gain(rate) - program.rows.adjoint(values, everything)
    x = weight / program.prior
    nu = np.add.reduceat(weight * (s - x), program.starts) / np.where(mass > 0, mass, 1.0)
    if program.competing:
        nu = np.where(mass < 1 - 1e-9, 0.0, np.maximum(nu, 0.0))
    off = program.prior * np.abs(x - np.maximum(s - np.repeat(nu, program.sizes), 0))
    found["stationary"] = float((off / np.maximum(1.0, np.abs(s))).max())
    if program.radius is not None:
        found["radius"] = max(0.0, float(chi2_of_problems(program, weight).mean()) / program.radius - 1)
    return found


def without_dust(program: Program, weight: Floats) -> Floats:
    """Weights below 1e-9 are rounding, for a problem has up to 1: they become 0, and its others make up for it."""
    dust = weight < 1e-9
    if not (weight[dust] != 0).any():
        return weight
    kept = np.where(dust, 0.0, weight)
    before, after = (np.add.reduceat(w, program.starts) for w in (weight, kept))
    return kept * np.repeat(np.divide(before, after, out=np.ones_like(after), where=after > 0), program.sizes)


class NotSolvedError(Exception):
    """A solver found no solution; the message is its own word for it."""


def solve_with_cvxpy(program: Program) -> Solution:
    """The program by OSQP with polishing, or Clarabel where that stalls; minutes where ``global_budget`` takes seconds.

    Under a radius Clarabel solves the cone program first. An interior point is good to the root of its tolerance only,
    as the objective is flat around the solution, but its multiplier gives tau, and near it the radius' own is sought
    with one projection a step.

    Raises:
        UserError: cvxpy is not installed.
        NotSolvedError: the solver calls the program infeasible, or did not converge.
    """
    try:
        stated = _Stated(program)
    except ImportError as error:
        raise UserError('--constraints: this program needs cvxpy; pip install "lark-fast[solver]"') from error
    if program.radius is None:
        rate = program.rate
        weight, z = stated.projection(rate)
    else:
        least = smallest_tau(program)
        excess: list[tuple[float, float]] = []  # (1/tau, mean chi2 beyond the radius)
        theta = 1 / max(stated.tau_of_radius(), least)
        for _ in range(_RADIUS_STEPS):
            rate = np.full(program.n_problems, theta)
            weight, z = stated.projection(rate)
            excess.append((theta, float(chi2_of_problems(program, weight).mean()) / program.radius - 1))
            if abs(excess[-1][1]) < _RADIUS_GOOD or (excess[-1][1] < 0 and theta >= 1 / least):
                break
            (a, of_a), (b, of_b) = excess[-2:] if len(excess) > 1 else ((0.0, -1.0), excess[-1])
            theta = min(b - of_b * (b - a) / (of_b - of_a), 1 / least) if of_a != of_b else b
    return Solution(weight=without_dust(program, weight), z=z, rate=rate, solver="cvxpy", residual=math.nan)


def smallest_tau(program: Program) -> float:
    """Below this tau a radius counts as out of reach: the weights are those of tau -> 0 but for rounding."""
    highest, lowest = (f.reduceat(program.energy, program.starts) for f in (np.maximum, np.minimum))
    return _SMALLEST_TAU * (float((highest - lowest).max()) or 1.0)


class _Stated:
    """The program's constraints in cvxpy's words."""

    def __init__(self, program: Program) -> None:
        import cvxpy as cp
        from scipy import sparse

        self.cp, self.program = cp, program
        sides, count, root = program.sides, len(program.prior), np.sqrt(program.prior)
        self.root = root
        self.y = cp.Variable(count)
        of_problem = sparse.csr_matrix(
            (root, np.arange(count), np.append(program.starts, count)), shape=(program.n_problems, count)
        )
        sums = of_problem @ self.y
        self.sides = []
        for c in range(len(sides)):
            row = program.rows.row(int(sides.row[c]), slice(0, count))
            amount = sparse.csr_matrix(sides.sign[c] * row * root / sides.scale[c]) @ self.y
            bound = sides.bound[c] / sides.scale[c]
            self.sides.append(amount == bound if sides.free[c] else amount <= bound)
        self.limits = [self.y >= 0, sums <= 1 if program.competing else sums == 1, *self.sides]

    def projection(self, rate: Floats) -> tuple[Floats, Floats]:
        """q ``[C]`` and the multipliers ``[M]`` for this 1/tau_n."""
        program, cp = self.program, self.cp
        gain = program.gain(rate)
        if not program.competing:
            gain -= np.repeat(np.add.reduceat(program.prior * gain, program.starts), program.sizes)
        problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(self.y - self.root * (1 + gain))), self.limits)
        # Where bounds are active with multiplier 0, OSQP may crawl, and it takes some large programs for infeasible. An
        # interior point does neither, but stops earlier.
        tight = dict.fromkeys(("eps_abs", "eps_rel", "eps_prim_inf", "eps_dual_inf"), 1e-10)
        attempts = ((cp.OSQP, tight | {"polishing": True, "max_iter": 20_000}), (cp.CLARABEL, _tolerances(1e-10)))
        found, failure = [], None
        for solver, settings in attempts:
            try:
                exact = _solve(problem, solver, **settings)
            except NotSolvedError as error:
                failure = error
                continue
            found.append(self._read())
            if exact:
                break
        if not found:
            raise failure
        fixed = replace(program, radius=None)
        return min(found, key=lambda pair: max(kkt_residuals(fixed, *pair, rate).values()))

    def _read(self) -> tuple[Floats, Floats]:
        z = np.array([float(np.squeeze(side.dual_value)) for side in self.sides]) / self.program.sides.scale
        return np.maximum(self.root * self.y.value, 0.0), z

    def tau_of_radius(self) -> float:
        """The multiplier of the radius, as a tau."""
        program, cp = self.program, self.cp
        length = math.sqrt(program.n_problems * program.radius)
        ball = cp.norm2(self.y - self.root) <= length
        gain = program.gain(np.ones(program.n_problems))
        scale = float(np.abs(gain).max()) or 1.0
        problem = cp.Problem(cp.Maximize((self.root * gain / scale) @ self.y), [*self.limits, ball])
        _solve(problem, cp.CLARABEL, **_tolerances(1e-10))
        # The ball's gradient is (y - sqrt p) / length, and tau is what stands before y - sqrt p.
        return scale * float(ball.dual_value) / length


def _tolerances(value: float) -> dict[str, float]:
    return dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), value) | {"max_iter": 500}


def _solve(problem: Any, solver: str, **settings: Any) -> bool:
    """Whether the solver met its tolerances; NotSolvedError where it has nothing to show."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate")  # the residuals decide
        try:
            problem.solve(solver=solver, **settings)
        except Exception as error:  # cvxpy's SolverError, and what a solver's binding throws
            raise NotSolvedError(str(error)) from error
    if problem.status not in ("optimal", "optimal_inaccurate", "user_limit"):
        raise NotSolvedError(problem.status)
    return problem.status == "optimal"


def judged(program: Program, solution: Solution) -> Solution:
    """The solution with its residual."""
    found = kkt_residuals(program, solution.weight, solution.z, solution.rate)
    return replace(solution, residual=max(found.values()))
