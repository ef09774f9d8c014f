r"""What the means of a problem's candidates will be, once some of their tokens have been scored.

The text of a trajectory is known from the start, and most of what a student makes of a token depends on which token it
is and which one stands before it. So the tokens that have not been scored, because they are still to come or because
the head has passed over them, are forecast from a table: x (nll or Brier score) of a word behind a word, from the
scored tokens of the problem's OTHER candidates,

    t(v, w) = (sum of x at "v w" + 2 t(w)) / (n(v, w) + 2),    t(w) = (sum of x at w + 4 m) / (n(w) + 4),

m being their mean. That a candidate's own tokens are left out makes r_t = x_t - t of its scored tokens what it will be
of the others: a trajectory's own distance from the table. It is shrunk towards the problem's mean distance, as in a
random-effects model: with s^2 the variance of a residual over its n scored tokens (of means of blocks, since
neighbours go together; and no less than that of all candidates together, since a text that begins quietly need not go
on so) and tau^2 that between candidates (DerSimonian and Laird),

    lambda = tau^2 / (tau^2 + s^2/n),
    mean of x = (sum of scored x + sum of t over the rest + (T - n) (r_all + lambda (r_own - r_all))) / T.

Candidates are ordered by g_hat, which is (2 brier_k - m nll_k) / S with m = sum_i brier_i / S and S = sum_i nll_i: S is
common to a problem, so the order is that of

    h_k = 2 brier_k - m nll_k,

and residuals are those of 2 brier - m nll. The error of h_k has two parts, that of the own distance and that of the
remaining T - n tokens about it:

    sd_k = (T - n)/T sqrt(tau^2 s^2/n / (tau^2 + s^2/n) + s^2 / (T - n)),

here with tau^2 raised by its own standard error, sqrt(2/(K - 1)) times the mean s^2/n. m depends on all candidates. To
first order its error is the sum of those of brier_k - m nll_k over S, which have the same form; they are taken to go
together, since a drift is common to them.

Stated assumptions: the drift along trajectories that the table does not see (a text's end may be easier than its words
say) is the same for all candidates at the same share of their lengths, and so leaves their order alone; errors are
nearly normal. Neither holds exactly: on long answers errors were 1.5 times what sd says, which the rule that several
have to be ahead takes up in part. The audit measures what comes of it. ``bernstein.py`` assumes less of them, and takes
more tokens.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lark_fast.racing.rules import RaceRules

BLOCK = 32  # tokens whose mean counts as one draw
WORD_WEIGHT, PAIR_WEIGHT = 4.0, 2.0  # of what stands behind a word, and behind a pair of words, in scored tokens
POOLED_BLOCKS = 8  # that the problem's variance weighs beside a candidate's own


class Forecast(NamedTuple):
    """Of each candidate, ``[K]``; of a candidate whose tokens are all scored, its own means."""

    nll: NDArray[np.float64]
    brier: NDArray[np.float64]
    h: NDArray[np.float64]  # orders as g_hat does
    sd: NDArray[np.float64]  # of the error of h, m being right; 0 where all is known; see ``Forecaster.quantile``
    sd_m: float  # of the error of m, which is the same for all candidates


class Forecaster:
    """Forecasts for one problem.

    Args:
        words: of each candidate, the token ids that are scored, ``[T]``.
        before: the token ids before these, ``[T]``.
        copies: how many candidates of the problem have these tokens.
        rules: of the race.
    """

    def __init__(
        self, words: Sequence[ArrayLike], before: Sequence[ArrayLike], copies: ArrayLike, rules: RaceRules
    ) -> None:
        self._rules = rules
        self.lengths = np.array([len(own) for own in words])
        self._copies = np.asarray(copies, dtype=np.float64)
        bounds = np.concatenate([[0], np.cumsum(self.lengths)])
        self._slices = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        self._owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        word, previous = (np.concatenate(list(map(np.asarray, ids))).astype(np.int64) for ids in (words, before))
        self._words = np.unique(word, return_inverse=True)[1]
        self._pairs = np.unique(previous << 32 | word, return_inverse=True)[1]

    def __call__(self, seen: NDArray[np.bool_], nll: NDArray[np.float64], brier: NDArray[np.float64]) -> Forecast:
        """Forecast from the tokens that are known.

        Args:
            seen: ``[sum T]`` of all candidates' tokens, one behind the other, which are known: at least one of each.
            nll, brier: ``[sum T]`` of them; what is not known is not read.
        """
        known = self.count(seen)
        rest = self.lengths - known
        values = {name: np.where(seen, x, 0.0) for name, x in (("nll", nll), ("brier", brier))}
        tables = {name: self.table(x, seen) for name, x in values.items()}
        sums = {name: self._sum(np.where(seen, x, tables[name])) for name, x in values.items()}
        distances = {name: np.where(seen, x - tables[name], 0.0) for name, x in values.items()}
        m = self._ratio(sums["brier"], sums["nll"])
        shrunk, sd = self._spread(2 * distances["brier"] - m * distances["nll"], seen)
        _, sd_of_m = self._spread(distances["brier"] - m * distances["nll"], seen)
        for name, distance in distances.items():
            mean = self._sum(distance) / known
            sums[name] = sums[name] + rest * (mean.mean() + shrunk * (mean - mean.mean()))
        m = self._ratio(sums["brier"], sums["nll"])
        means = {name: total / self.lengths for name, total in sums.items()}
        sd_m = float(self._copies @ sd_of_m / max(self._copies @ means["nll"], np.finfo(float).tiny))
        return Forecast(means["nll"], means["brier"], 2 * means["brier"] - m * means["nll"], sd, sd_m)

    @property
    def quantile(self) -> float:
        """How many ``sd`` an error may have by the rules."""
        return self._rules.deviations

    def count(self, which: NDArray[np.bool_]) -> NDArray[np.int64]:
        """``[K]`` how many tokens of each candidate these ``[sum T]`` are."""
        return np.bincount(self._owner[which], minlength=len(self.lengths))

    def _spread(
        self, residuals: NDArray[np.float64], seen: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """``lambda`` and ``sd`` of each candidate, ``[K]``."""
        known = self.count(seen)
        rest, variance = self.lengths - known, self._variance(residuals, seen)
        own, of_own = self._sum(residuals) / known, variance / known
        between = max(0.0, float(own.var(ddof=1) - of_own.mean())) if len(own) > 1 else 0.0
        shrunk = between / (between + of_own + np.finfo(float).tiny)
        # Few candidates may look more alike than they are.
        perhaps = between + np.sqrt(2 / max(1, len(own) - 1)) * float(of_own.mean())
        of_distance = perhaps * of_own / (perhaps + of_own + np.finfo(float).tiny)
        return shrunk, rest / self.lengths * np.sqrt(of_distance + variance / np.maximum(1, rest))

    def _sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Over each candidate's tokens."""
        return np.bincount(self._owner, values, len(self.lengths))

    def _ratio(self, brier: NDArray[np.float64], nll: NDArray[np.float64]) -> float:
        """``m`` from sums over tokens; copies count as the candidates that they are."""
        weights = self._copies / self.lengths
        below = float(weights @ nll)
        return float(weights @ brier) / below if below > 0 else 0.0

    def table(self, values: NDArray[np.float64], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """``t`` of every token, from what is seen of the other candidates."""
        table = np.empty(len(values))
        of_words, of_pairs = (self._totals(codes, values, seen) for codes in (self._words, self._pairs))
        total, count = values.sum(), np.count_nonzero(seen)
        for own in self._slices:
            x, there = values[own], seen[own]
            mean = (total - x.sum()) / max(1, count - np.count_nonzero(there))
            below = mean
            for codes, (sums, counts), weight in (
                (self._words[own], of_words, WORD_WEIGHT),
                (self._pairs[own], of_pairs, PAIR_WEIGHT),
            ):
                own_sums, own_counts = self._totals(codes, x, there, len(sums))
                n = (counts - own_counts)[codes]
                below = ((sums - own_sums)[codes] + weight * below) / (n + weight)
            table[own] = below
        return table

    @staticmethod
    def _totals(
        codes: NDArray[np.int64], values: NDArray[np.float64], seen: NDArray[np.bool_], size: int = 0
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Sum and number of the seen tokens of each code."""
        return np.bincount(codes, values, size), np.bincount(codes[seen], minlength=size or int(codes.max()) + 1)

    def _variance(self, residuals: NDArray[np.float64], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """``s^2`` of each candidate, a token's: BLOCK times the variance of block means, with some of the problem's."""
        known = self.count(seen)
        blocks = known // BLOCK
        blocks = np.where(blocks >= 2, blocks, 0)
        own = np.zeros(len(known))
        for k in np.flatnonzero(blocks):
            here = self._slices[k]
            means = residuals[here][seen[here]][: blocks[k] * BLOCK].reshape(-1, BLOCK).mean(1)
            own[k] = BLOCK * means.var(ddof=1)
        if blocks.any():
            pooled = float(own @ blocks) / blocks.sum()
        else:  # too few tokens for blocks
            pooled = float(residuals @ residuals) / max(1, known.sum())
        return np.maximum(pooled, (own * blocks + POOLED_BLOCKS * pooled) / (blocks + POOLED_BLOCKS))
