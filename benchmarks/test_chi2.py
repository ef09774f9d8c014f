"""``chi2_solve`` and ``chi2_weights`` beside a copy of their operands, and beside other ways: chi2.py."""

import numpy as np
import pytest

from benchmarks import chi2
from benchmarks.comparison import compare, compare_workload
from lark_fast.kernels.chi2 import chi2_weights

BOTH = pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])


@BOTH
@pytest.mark.parametrize("dtype", chi2.DTYPES, ids=str)
def test_chi2_solve(benchmark, ragged, dtype):
    compare_workload(benchmark, chi2.solving(dtype=dtype, ragged=ragged))
    speedup = benchmark.extra_info.get("speedup", {})
    if chi2.CVXPY in speedup:
        speedup[chi2.CVXPY] *= chi2.N / chi2.CVXPY_N  # as if it took as long for each of all problems


@BOTH
def test_chi2_weights(benchmark, ragged):
    energies = chi2.inputs(ragged=ragged)
    as_lists, out = energies.tolist(), np.empty_like(energies)
    peers = {"Python loop": lambda: chi2.loop(as_lists)}
    if not ragged:
        peers["numpy, a sort"] = lambda: chi2.plain(energies)

    def check(results):
        for weights in results.values():
            np.testing.assert_allclose(weights, results["ours"], rtol=0, atol=1e-12)

    compare(
        benchmark,
        "chi2 weights" + (", ragged" if ragged else ""),
        lambda: chi2_weights(energies, budget=chi2.BUDGET),
        limit=lambda: np.copyto(out, energies),
        peers=peers,
        check=check,
        shape=f"N={chi2.N} K={chi2.K}",
        dtype="float64",
    )
