"""How a problem's candidates share its weight: one function a policy, over padded arrays, found by name in POLICIES.

A policy looks at some numbers of each candidate, its columns. It gets each as ``[N, K]``, NaN where there is no
candidate, candidates in the order of the scores, and returns two arrays of that shape: the weights, which sum to 1 in
each row that has one, and which candidates become training rows.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.kernels.chi2 import DEFAULT_BUDGET, chi2_weights

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Columns = Mapping[str, Floats]

# Columns that are made here, beside those of the scores.
RANDOM, TEACHER_RANK = "random", "teacher_rank"

# What a policy of one's own sees.
OWN_COLUMNS = ("g_hat", "nll", "brier", "entropy", "rank_mean", "rsr", "rho", "n_tokens", RANDOM, TEACHER_RANK)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """What a policy may be told.

    Attributes:
        budget: candidates of a problem, at most (chi2: see ``chi2_weights``).
        tau: temperature of chi2 or kl, in the units of g_hat.
        ties: "exact" or "reference", see ``chi2_weights``.
        band: least and greatest perplexity exp(nll) that the policy "perplexity" takes.
    """

    budget: int | None = None
    tau: float | None = None
    ties: str = "exact"
    band: tuple[float, float] = (0.0, math.inf)

    @property
    def size(self) -> int:
        """The budget, or its default."""
        return DEFAULT_BUDGET if self.budget is None else self.budget


@dataclass(frozen=True, slots=True)
class Policy:
    """The columns that a policy looks at, what it makes of them, and whether it knows a tau and a band."""

    columns: tuple[str, ...]
    weigh: Callable[[Columns, PolicyOptions], tuple[Floats, Bools]]
    has_tau: bool = False
    has_band: bool = False


def chi2(columns: Columns, options: PolicyOptions) -> tuple[Floats, Bools]:
    """LARK's own: the chi-squared regularised maximiser of the expected g_hat."""
    g_hat = columns["g_hat"]
    weights = chi2_weights(g_hat, options.budget, tau=options.tau, ties=options.ties)
    if options.ties == "reference":
        # The released code writes its top B, boundary ties of weight 0 among them.
        return weights, _first(-g_hat, options.size)
    return weights, weights > 0


def kl(columns: Columns, options: PolicyOptions) -> tuple[Floats, Bools]:
    """The KL-regularised maximiser of the expected g_hat: softmax(g_hat / tau).

    With a tau alone over all candidates; with tau and a budget over the best ``budget``; with a budget alone, tau is
    each problem's own, such that the perplexity exp(entropy(q)) is the budget (a problem that has no more candidates,
    or whose best tie, shares alike among these).
    """
    g_hat = columns["g_hat"]
    if options.tau is None:
        weights = _softmax_of_perplexity(g_hat, options.size)
    else:
        held = ~np.isnan(g_hat) if options.budget is None else _first(-g_hat, options.budget)
        weights = _softmax(np.where(held, g_hat, np.nan), np.full((len(g_hat), 1), options.tau))
    return weights, weights > 0


def perplexity(columns: Columns, options: PolicyOptions) -> tuple[Floats, Bools]:
    """``budget`` of the candidates whose perplexity exp(nll) is in the band, drawn at random, alike."""
    with np.errstate(over="ignore"):
        value = np.exp(columns["nll"])
    inside = (value >= options.band[0]) & (value <= options.band[1])
    return _alike(_first(np.where(inside, columns[RANDOM], np.nan), options.size))


def lowest(column: str) -> Policy:
    """The B candidates with the lowest values, alike; the first ones among ties."""
    return Policy((column,), lambda columns, options: _alike(_first(columns[column], options.size)))


def highest(column: str) -> Policy:
    """The B candidates with the highest values, alike; the first ones among ties."""
    return Policy((column,), lambda columns, options: _alike(_first(-columns[column], options.size)))


POLICIES = {
    "chi2": Policy(("g_hat",), chi2, has_tau=True),
    "topb": highest("g_hat"),
    "kl": Policy(("g_hat",), kl, has_tau=True),
    "random": lowest(RANDOM),
    "nll": lowest("nll"),  # naturalness: what the student would say itself
    "local": lowest("local_step_nll"),  # the same, step by step (LALP, arXiv 2510.03988)
    "perplexity": Policy(("nll", RANDOM), perplexity, has_band=True),
    "entropy": highest("entropy"),  # uncertainty sampling
    "rsr": lowest("rsr"),  # Rank-Surprisal Ratio, arXiv 2601.14249
    "rho": highest("rho"),  # the learnability factor's proxy by itself
    "measured": highest("rho_measured"),  # what it stands in for: what a few steps have taught fastest
    "brier": highest("brier"),  # the squared error norm of EL2N (arXiv 2107.07075), a token
    "shortest": lowest("n_tokens"),
    "longest": highest("n_tokens"),
    "teacher": lowest(TEACHER_RANK),
}


def find_policy(name: str) -> Policy:
    """A policy by its name, or one's own as ``module:function``.

    The function gets (columns, options) as every policy does, with the columns OWN_COLUMNS, and returns the weights
    alone, ``[N, K]``, which are made to sum to 1. The module is looked for in the working directory too.

    Raises:
        UserError: there is no such policy, module or function.
    """
    if name in POLICIES:
        return POLICIES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(f"--policy {name}: unknown; known are {', '.join(POLICIES)}, and module:function for one's own")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        weigh = getattr(importlib.import_module(module), function)
    # Whatever a module raises when it is imported.
    except (Exception, SystemExit) as error:
        raise UserError(f"--policy {name}: cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(weigh):
        raise UserError(f"--policy {name}: is no function")
    return Policy(
        OWN_COLUMNS, lambda columns, options: _own(name, weigh, columns, options), has_tau=True, has_band=True
    )


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


def _alike(chosen: Bools) -> tuple[Floats, Bools]:
    return chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1), chosen


def _softmax(energies: Floats, tau: Floats) -> Floats:
    """softmax(e / tau) of each row, ``[N, K]`` and ``[N, 1]`` -> ``[N, K]``; 0 where e is NaN."""
    best = np.max(energies, axis=1, keepdims=True, initial=-np.inf, where=~np.isnan(energies))
    with np.errstate(over="ignore"):
        weights = np.exp((energies - np.where(np.isfinite(best), best, 0.0)) / tau)
    weights[np.isnan(energies)] = 0.0
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1.0)


def _softmax_of_perplexity(energies: Floats, target: int) -> Floats:
    """softmax(e / tau) with the tau at which exp(entropy) is ``target``, by bisection; it grows with tau."""
    valid = ~np.isnan(energies)
    count = valid.sum(axis=1, keepdims=True)
    highest = np.max(energies, axis=1, keepdims=True, initial=-np.inf, where=valid)
    spread = highest - np.min(energies, axis=1, keepdims=True, initial=np.inf, where=valid)
    unit = np.where((count > 0) & (spread > 0), spread, 1.0)
    low, high = np.full(count.shape, -40.0), np.full(count.shape, 40.0)  # log2 of tau in units of the spread
    for _ in range(60):
        middle = (low + high) / 2
        weights = _softmax(energies, unit * np.exp2(middle))
        entropy = -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=1, keepdims=True)
        wide = np.exp(entropy) >= target
        low, high = np.where(wide, low, middle), np.where(wide, middle, high)
    alike = valid / np.maximum(count, 1)
    return np.where(count <= target, alike, _softmax(energies, unit * np.exp2(high)))


def _own(name: str, weigh: Callable[..., Any], columns: Columns, options: PolicyOptions) -> tuple[Floats, Bools]:
    """What a user's function returns, as weights that sum to 1 in each row that has one."""
    absent = np.isnan(columns["g_hat"])
    try:
        own = {column: values.copy() for column, values in columns.items()}
        returned = weigh(own, options if options.tau is not None else replace(options, budget=options.size))
        weights = np.array(returned, dtype=np.float64)
    # Whatever it raises, or returns.
    except (Exception, SystemExit) as error:
        known = f"; columns are {', '.join(columns)}" if isinstance(error, KeyError) else ""
        raise UserError(f"--policy {name}: failed ({type(error).__name__}: {error}){known}") from error
    if weights.shape != absent.shape:
        raise UserError(f"--policy {name}: returned the shape {weights.shape} where {absent.shape} was due")
    weights[absent] = 0.0
    if np.iscomplexobj(returned) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise UserError(f"--policy {name}: returned weights that are negative, infinite, complex or NaN")
    largest = weights.max(axis=1, keepdims=True)
    weights /= np.where(largest > 0, largest, 1.0)
    total = weights.sum(axis=1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0), weights > 0
