"""How a problem's candidates share its weight: one function a policy, over padded arrays, found by name in POLICIES.

A policy looks at one number a candidate. It gets them as ``[N, K]``, NaN where there is no candidate, candidates in
the order of the scores, and returns two arrays of that shape: the weights, which sum to 1 in each row that has a
candidate, and which candidates become training rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lark_fast.kernels.chi2 import DEFAULT_BUDGET, chi2_weights

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """What a policy may be told: a budget or, for chi2, tau (see ``chi2_weights``)."""

    budget: int | None = None
    tau: float | None = None
    ties: str = "exact"

    @property
    def size(self) -> int:
        """The budget, or its default."""
        return DEFAULT_BUDGET if self.budget is None else self.budget


@dataclass(frozen=True, slots=True)
class Policy:
    """The column of the scores that a policy looks at (None: ``random_draws``), and what it makes of it."""

    column: str | None
    weigh: Callable[[Floats, PolicyOptions], tuple[Floats, Bools]]


def chi2(g_hat: Floats, options: PolicyOptions) -> tuple[Floats, Bools]:
    """LARK's own: the chi-squared regularised maximiser of the expected g_hat."""
    weights = chi2_weights(g_hat, options.budget, tau=options.tau, ties=options.ties)
    if options.ties == "reference":
        # The released code writes its top B, boundary ties of weight 0 among them.
        return weights, _first(-g_hat, options.size)
    return weights, weights > 0


def highest(values: Floats, options: PolicyOptions) -> tuple[Floats, Bools]:
    """The B candidates with the highest values, alike; the first ones among ties."""
    return lowest(-values, options)


def lowest(values: Floats, options: PolicyOptions) -> tuple[Floats, Bools]:
    """The B candidates with the lowest values, alike; the first ones among ties."""
    chosen = _first(values, options.size)
    return chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1), chosen


POLICIES = {
    "chi2": Policy("g_hat", chi2),
    "topb": Policy("g_hat", highest),
    "random": Policy(None, lowest),
    "nll": Policy("nll", lowest),
    "rsr": Policy("rsr", lowest),
}


def random_draws(keys: NDArray[np.uint64], seed: int) -> Floats:
    """One number in [0, 1) a candidate, ``[R]`` -> ``[R]``, from its key's hash and the seed and nothing else.

    So a problem's draw depends neither on the order of the pool nor on what other problems it holds. The mixing is
    SplitMix64's (Steele, Lea and Flood, 2014).
    """
    seeds = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return (_mix(keys ^ _mix(seeds)) >> np.uint64(11)) * 2.0**-53


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _first(values: Floats, count: int) -> Bools:
    """The ``count`` lowest of each row, by index among equal ones; NaN never."""
    order = np.argsort(values, axis=1, kind="stable")
    chosen = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(chosen, order[:, :count], True, axis=1)
    return chosen & ~np.isnan(values)
