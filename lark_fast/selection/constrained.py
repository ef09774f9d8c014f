"""The door to selection under constraints: weights by whichever solver does it, checked, and what is said of them."""

import math
from dataclasses import dataclass

import numpy as np

from lark_fast.errors import UserError
from lark_fast.kernels.chi2 import chi2_weights
from lark_fast.selection.blocks import same_size
from lark_fast.selection.conflicts import SHOWN, conflict
from lark_fast.selection.constraints import Constraints, Floats
from lark_fast.selection.global_budget import GOOD, Dual, InfeasibleError, minimised, within_radius
from lark_fast.selection.program import (
    BLOCK_CELLS,
    Candidates,
    NotSolvedError,
    Program,
    Solution,
    chi2_of_problems,
    judged,
    pose,
    smallest_tau,
    solve_with_cvxpy,
    without_dust,
)

SOLVERS = ("auto", "dual", "cvxpy")

_GENERAL_GOOD = 1e-6  # what one of the general solver must have
_GENERAL_MOST = 200_000  # candidates that it is given where the dual fails: it would be at more for hours


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstrainedWeights:
    """The weights of a selection under constraints.

    Attributes:
        weight: ``[R]``, 0 off the support and where there is no candidate.
        multipliers: what it is worth in the objective to loosen a bound by a unit, by name: "budget.tokens" a token,
            "groups.teacher.a max" a unit of weight. The objective is sum <q, e> / tau_n - chi2 / 2 or, under a
            chi2_radius, sum <q, e>, and "chi2_radius" is then worth N tau / 2 a unit. Of an equality ("budget.samples",
            "groups.teacher.a min = max"), to raise it, which may be below 0.
        tau: the tau that all problems share, infinite where q = p; None where each has its own, of a budget.
        solver: "closed form", "dual" or "cvxpy".
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
    try:
        solution = _solved(program, solver)
    except InfeasibleError as error:
        raise constraints.error(conflict(program, error)) from None
    except NotSolvedError as error:
        if tau is not None and tau < smallest_tau(program):
            raise UserError(
                f"--tau {tau:g}: too small beside these energies to meet --constraints {constraints.source} within the "
                f"digits of float64; give at least {smallest_tau(program):.1g}, below which little changes"
            ) from error
        raise constraints.error(
            f"no solution was found ({error}); so it is where constraints next to contradict: loosen them a little"
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
        lines=_row_lines(constraints, weight, candidates.n_tokens, shared) + _lines(program, solution, multipliers),
    )


def _solved(program: Program, solver: str) -> Solution:
    if solver == "cvxpy":
        return _general(program)
    if solver == "auto" and program.radius is None and not program.competing:
        solution = _closed_form(program)
        if solution is not None:
            return solution
    try:
        return _dual(program)
    except NotSolvedError:
        if solver == "dual" or len(program.energy) > _GENERAL_MOST:
            raise
    return _general(program)


def _closed_form(program: Program) -> Solution | None:
    """The solution without the sides, if it satisfies them."""
    weight = program.prior.copy()
    if program.rate.any():
        how = {"budget": program.budget} if program.tau is None else {"tau": program.tau}
        for _, cells in same_size(program.starts, program.sizes, BLOCK_CELLS):
            prior = None if program.uniform else program.prior[cells]
            weight[cells] = chi2_weights(program.energy[cells], prior=prior, **how)
    if program.tau is not None:
        weight = without_dust(program, weight)
    sides = program.sides
    if len(sides):
        gap = sides.sign * program.rows.times(weight, slice(0, len(weight)))[sides.row] - sides.bound
        if (np.where(sides.free, np.abs(gap), gap) > GOOD * sides.scale).any():
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
        z, rate = within_radius(program)
    else:
        z, rate = minimised(program, program.gain(), np.zeros(len(program.sides)))[0], program.rate
    weight = without_dust(program, Dual(program, program.gain(rate)).weights(z))
    solution = judged(program, Solution(weight=weight, z=z, rate=rate, solver="dual", residual=math.nan))
    if not solution.residual <= GOOD:
        raise NotSolvedError(f"the dual left a residual of {solution.residual:.1e}")
    return solution


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


def _row_lines(constraints: Constraints, weight: Floats, n_tokens: Floats, tau: float | None) -> tuple[str, ...]:
    held = weight > 0
    said = []
    for name, limit, reached in (
        ("rows", constraints.rows, np.count_nonzero(held)),
        ("row_tokens", constraints.row_tokens, np.sum(n_tokens[held])),
    ):
        if limit is not None:
            said.append(f"budget.{name}: {int(reached):,} of at most {int(limit):,}, by a tau of {tau:.6g}")
    if constraints.length_penalty:
        said.append(f"length_penalty: {constraints.length_penalty:g} taken off the energy for each token")
    return tuple(said)


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
            reached, bound = totals[c] * unit, sides.bound[c] * unit
            said.append(f"{name}: weight x tokens {reached:,.0f} of at most {bound:,.0f}, {ending}")
        elif multiplier and len(said) < SHOWN:
            said.append(f"{sides.texts[c]}: {totals[c] / program.total:.2%} of the weight, {ending}")
        else:
            loose += 1
    if loose:
        said.append(f"more bounds on shares that hold: {loose:,}")
    return tuple(said)
