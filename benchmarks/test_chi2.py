"""``chi2_weights`` of many problems beside a copy of them, and beside a loop over the problems.

Bytes of the limit: 2 x 8 N K, float64 in and out.
"""

import math

import numpy as np
import pytest

from benchmarks.comparison import compare
from lark_fast.kernels.chi2 import chi2_weights

N, K = 300_000, 33  # 79 MB in and 79 MB out: more than caches hold
BUDGET = 3


def loop(energies):
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


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_chi2_weights(benchmark, ragged):
    rng = np.random.default_rng(0)
    energies = rng.normal(size=(N, K))
    if ragged:
        energies[np.arange(K) >= rng.integers(1, K + 1, size=(N, 1))] = np.nan
    as_lists, out = energies.tolist(), np.empty_like(energies)
    compare(
        benchmark,
        "chi2 weights" + (", ragged" if ragged else ""),
        lambda: chi2_weights(energies, budget=BUDGET),
        limit=lambda: np.copyto(out, energies),
        peers={"Python loop": lambda: loop(as_lists)},
        check=lambda results: np.testing.assert_allclose(*results.values(), rtol=0, atol=1e-12),
        shape=f"N={N} K={K}",
        dtype="float64",
    )
