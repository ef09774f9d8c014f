"""Selection under constraints by the dual beside a copy of its candidates, and beside cvxpy where that can follow.

Bytes of the limit: 2 x 32 R; problem, energy, tokens and weight of R candidates, 8 bytes each, are read and written.
A million candidates take cvxpy many minutes (with shares OSQP does not converge on 100,000), so it stands beside fewer.
``ns_a_candidate`` goes into pytest-benchmark's record.
"""

import numpy as np
import pytest

from benchmarks.comparison import compare
from lark_fast.selection.constrained import constrained_weights
from lark_fast.selection.constraints import Constraints, Share
from lark_fast.selection.program import Candidates

BUDGET = 3
TEACHERS = [f"teacher {k}" for k in range(8)]


def drawn(n, ragged):
    """n problems of 33 candidates on average, with the spread of g_hat and of reasoning lengths."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 66, size=n) if ragged else np.full(n, 33)
    problem = np.repeat(np.arange(n), sizes)
    count = len(problem)
    return Candidates(
        problem=problem,
        energies=0.03 + 0.02 * rng.normal(size=count),
        n_tokens=rng.lognormal(8, 0.7, size=count).astype(np.int64),
        groups={"teacher": (rng.integers(0, len(TEACHERS), size=count), TEACHERS)},
    )


def within(candidates, *, shares):
    """Four fifths of the tokens that the mean candidates have; one teacher has a floor, the others a ceiling."""
    n = candidates.problem[-1] + 1
    groups = {"teacher": {TEACHERS[0]: Share(min=0.2, max=0.3), "*": Share(max=0.12)}} if shares else {}
    return Constraints(source="", tokens=0.8 * float(candidates.n_tokens.mean()) * n, groups=groups)


def timed(benchmark, name, candidates, constraints, *, peer):
    count = len(candidates.energies)
    inputs = np.empty((4, count))
    copied = np.empty_like(inputs)

    def check(results):
        for found in results.values():
            assert found.residual <= (1e-9 if found.solver == "dual" else 1e-6)
            np.testing.assert_allclose(found.weight, results["ours"].weight, rtol=0, atol=1e-6)

    compare(
        benchmark,
        name,
        lambda: constrained_weights(candidates, constraints, budget=BUDGET),
        limit=lambda: np.copyto(copied, inputs),
        peers={"cvxpy": lambda: constrained_weights(candidates, constraints, budget=BUDGET, solver="cvxpy")}
        if peer
        else {},
        check=check,
        shape=f"R={count}",
        dtype="float64",
    )
    if benchmark.stats is not None:
        benchmark.extra_info["ns_a_candidate"] = benchmark.stats.stats.min * 1e9 / count


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("shares", [False, True], ids=["tokens", "tokens and shares"])
def test_a_million_candidates(benchmark, shares, ragged):
    candidates = drawn(30_304, ragged)
    name = "tokens and shares" if shares else "tokens"
    timed(benchmark, f"{name}{', ragged' if ragged else ''}", candidates, within(candidates, shares=shares), peer=False)


@pytest.mark.parametrize(("shares", "n"), [(False, 1_000), (True, 300)], ids=["tokens", "tokens and shares"])
def test_beside_cvxpy(benchmark, shares, n):
    pytest.importorskip("cvxpy")
    candidates = drawn(n, ragged=False)
    name = "tokens and shares" if shares else "tokens"
    timed(benchmark, name, candidates, within(candidates, shares=shares), peer=True)
