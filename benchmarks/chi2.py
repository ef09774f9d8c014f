"""``chi2_solve`` as it is benchmarked: many problems, beside a copy of them and other ways to the same weights.

Bytes of the limit: 2 x 8 N K, float64 in and out (2 x 4 N K in float32).
"""

import math
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from benchmarks.comparison import DEVICE, Workload, note_missing
from lark_fast.kernels.chi2 import Chi2Solution, chi2_solve
from lark_fast.kernels.dispatch import has_triton

NAME = "chi2_solve"
CUDA = DEVICE.type == "cuda"
N = 1_000_000 if CUDA else 300_000  # of 33 float64: 264 and 79 MB in, as much out, more than caches hold
K, BUDGET = 33, 3
CVXPY_N = 300  # problems that cvxpy solves
CVXPY = f"cvxpy, from {CVXPY_N} problems"
DTYPES = (torch.float32, torch.float64) if CUDA else (torch.float64,)


def inputs(n: int = N, k: int = K, ragged: bool = False, seed: int = 0) -> np.ndarray:
    """Energies ``[n, k]``; ragged: 1 to k candidates, then NaN."""
    rng = np.random.default_rng(seed)
    energies = rng.normal(size=(n, k))
    if ragged:
        energies[np.arange(k) >= rng.integers(1, k + 1, size=(n, 1))] = np.nan
    return energies


def loop(energies: list[list[float]]) -> list[list[float]]:
    """One problem after the other, in plain Python: the best BUDGET candidates, by how far each is above the next."""
    weights = []
    for problem in energies:
        order = sorted((k for k, e in enumerate(problem) if not math.isnan(e)), key=lambda k: -problem[k])
        best, rest = order[:BUDGET], order[BUDGET:]
        above = [problem[k] - problem[rest[0]] if rest else 1.0 for k in best]
        row = [0.0] * len(problem)
        for k, distance in zip(best, above, strict=True):
            row[k] = distance / sum(above)
        weights.append(row)
    return weights


def plain(energies: np.ndarray) -> np.ndarray:
    """The usual numpy: sort, subtract the threshold, clip, divide. No care for ties or NaN."""
    above = np.maximum(energies - np.sort(energies, axis=1)[:, [-1 - BUDGET]], 0.0)
    return above / above.sum(axis=1, keepdims=True)


def plain_torch(energies: torch.Tensor) -> torch.Tensor:
    """The same with the library's selection of the largest, on the GPU."""
    above = (energies - energies.topk(BUDGET + 1).values[:, -1:]).clamp(min=0)
    return above / above.sum(1, keepdim=True)


def cvxpy_solver(energies: np.ndarray) -> Callable[[], np.ndarray]:
    """All problems as one program: the projections of y = q / sqrt(p), a constraint a problem, at our tau."""
    import cvxpy as cp

    n, k = energies.shape
    tau = chi2_solve(energies, BUDGET).tau[:, None]
    y = cp.Variable((n, k))
    target = (1 + (energies - energies.mean(axis=1, keepdims=True)) / tau) / math.sqrt(k)
    constraints = [cp.sum(y, axis=1) == math.sqrt(k), y >= 0]
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(y - target)), constraints)

    def solve() -> np.ndarray:
        problem.solve(solver=cp.OSQP, eps_abs=1e-8, eps_rel=1e-8, max_iter=20_000)
        return y.value / math.sqrt(k)

    return solve


def solving(n: int = N, dtype: torch.dtype = torch.float64, ragged: bool = False) -> Workload:
    """Weights of n problems and all that is told of them: tensors on a GPU, arrays on a CPU."""
    energies = inputs(n, ragged=ragged)
    if CUDA:
        operand = torch.from_numpy(energies).to(DEVICE, dtype)
        energies = operand.double().cpu().numpy()
        out, peers = torch.empty_like(operand), {"torch.topk (weights only)": lambda: plain_torch(operand)}
    else:
        operand, out, peers = energies, np.empty_like(energies), {}
        if not ragged:
            peers["numpy, a sort (weights only)"] = lambda: plain(operand)
    if not (ragged or CUDA):
        if find_spec("cvxpy") and find_spec("osqp"):
            peers[CVXPY] = cvxpy_solver(energies[:CVXPY_N])
        else:
            note_missing("cvxpy with osqp (not installed)")
    return Workload(
        name=NAME + (", ragged" if ragged else ""),
        shape=f"N={n} K={K}",
        dtype=dtype,
        ours=lambda impl: chi2_solve(operand, BUDGET, impl=impl),
        implementations=("triton",) if CUDA and has_triton() else ("numpy",),
        limit=(lambda: out.copy_(operand)) if CUDA else (lambda: np.copyto(out, operand)),
        peers=peers,
        check=lambda solution: check(solution, energies),
    )


def check(solution: Chi2Solution, energies: np.ndarray) -> None:
    """Fails where a number is not that of a loop over some of the problems, in float64."""
    assert not [entry for entry in errors(solution, energies) if not entry["ok"]]


def errors(solution: Chi2Solution, energies: np.ndarray) -> list[dict]:
    """Errors of all that is told against a loop over up to 3,000 of the problems, by the formulas' words."""
    some = np.arange(0, len(energies), math.ceil(len(energies) / 3000))
    truth = {name: [] for name in ("q", "nu", "tau", "support", "effective_sample_size", "chi2_divergence")}
    for problem in energies[some]:
        q = np.array(loop([problem.tolist()])[0])
        valid = np.sort(problem[~np.isnan(problem)])[::-1]
        nu = valid[BUDGET] if len(valid) > BUDGET else -math.inf
        p = np.where(np.isnan(problem), 0.0, 1 / len(valid))
        values = (q, nu, (valid - nu)[valid > nu].sum() / len(valid), (q > 0).sum(), 1 / (q**2).sum())
        for own, value in zip(truth.values(), (*values, ((q - p)[p > 0] ** 2 / p[p > 0]).sum()), strict=True):
            own.append(value)
    half = isinstance(solution.q, torch.Tensor) and solution.q.dtype == torch.float32
    entries = []
    for name, exact in truth.items():
        value, exact = getattr(solution, name), np.array(exact)
        value = (value.double().cpu().numpy() if isinstance(value, torch.Tensor) else value)[some]
        # A problem with no more candidates than the budget has no threshold; a divergence may be 0.
        finite = np.isfinite(exact)
        difference = np.where(finite, value, 0.0) - np.where(finite, exact, 0.0)
        error = float(np.linalg.norm(difference) / np.linalg.norm(np.where(finite, exact, 0.0)))
        budget = 1e-7 if name == "q" and half else 1e-12
        same = bool((value[~finite] == exact[~finite]).all())
        largest = float(np.abs(difference).max())
        ok = same and error <= budget
        entries.append({"statistic": name, "error": error, "largest_error": largest, "budget": budget, "ok": ok})
    return entries
