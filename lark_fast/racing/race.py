"""The race of one problem: who is scored how far, round by round, and what is known of each at the end.

With a risk, a candidate stops when enough others, as many as can win, are ahead of its forecast by more than chance
explains. At risk 0 it stops when they are ahead whatever its remaining tokens are: of a token, 0 <= brier <= 2 and
0 <= nll, so that

    h = 2 brier - m nll  <=  (2 sum of scored brier + 4 rest - m sum of scored nll) / T,

and since m depends on tokens that nobody has seen, this has to hold for every m that they leave open, from 0 on. The
bound is linear in m, so that its ends tell; those ahead must have been scored in full, for nothing bounds an nll.

Winners and the one behind them, which sets the threshold, are scored in full in any case.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lark_fast.racing.forecast import Forecast, Forecaster
from lark_fast.racing.rules import FEWEST, RaceRules
from lark_fast.scoring.learnability import g_hat

MOST_BRIER = 2.0
FURTHER = 0.2  # of their lengths, that those who have stopped are scored on where m has to be known better
MARGIN = 1e-9  # of sums in another order


class Outcome(NamedTuple):
    """Of each candidate, ``[K]``."""

    known: NDArray[np.int64]  # scored tokens
    nll: NDArray[np.float64]  # means; forecast where not all is known
    brier: NDArray[np.float64]
    winner: NDArray[np.bool_]


class Race:
    """Run it: ``while (asked := race.asks()) is not None``: score that far, and ``take`` what comes of it.

    Args:
        words, before, copies: see ``Forecaster``.
        rules: what it is run by.
        forecasts: what makes forecasts.
    """

    def __init__(
        self,
        words: Sequence[ArrayLike],
        before: Sequence[ArrayLike],
        copies: ArrayLike,
        rules: RaceRules,
        forecasts: type[Forecaster] = Forecaster,
    ) -> None:
        self._forecaster = forecasts(words, before, copies)
        self._copies, self._rules = np.asarray(copies), rules
        self.lengths = self._forecaster.lengths
        self._bounds = np.concatenate([[0], np.cumsum(self.lengths)])
        self._nll, self._brier = (np.full(self._bounds[-1], np.nan) for _ in range(2))
        self.known = np.zeros(len(self.lengths), dtype=np.int64)
        self._course = self._hard() if rules.risk == 0 else self._soft()

    def asks(self) -> NDArray[np.int64] | None:
        """``[K]`` how many tokens of each candidate are to be known next; None: the race is over."""
        return next((goal for goal in self._course if (goal > self.known).any()), None)

    def take(self, candidate: int, nll: ArrayLike, brier: ArrayLike) -> None:
        """The next tokens of a candidate."""
        start = self._bounds[candidate] + self.known[candidate]
        self.known[candidate] += len(nll)
        here = slice(start, self._bounds[candidate] + self.known[candidate])
        self._nll[here], self._brier[here] = nll, brier

    def outcome(self) -> Outcome:
        """What is known at the end."""
        if self._finite():
            forecast = self._forecast()
            return Outcome(self.known.copy(), forecast.nll, forecast.brier, self._leaders(forecast.h, 0))
        # All have been scored to their ends, and those whose numbers are none take no part.
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        nll, brier = (np.bincount(owner, x) / self.lengths for x in (self._nll, self._brier))
        of = np.repeat(np.arange(len(nll)), self._copies)
        energies = g_hat(nll[of], brier[of], np.zeros(len(of)))[np.cumsum(self._copies) - 1]
        return Outcome(self.known.copy(), nll, brier, self._leaders(energies, 0))

    def _forecast(self) -> Forecast:
        return self._forecaster(self.known, self._nll, self._brier)

    def _soft(self) -> Iterator[NDArray[np.int64]]:
        running = np.ones(len(self.lengths), dtype=bool)
        for share in self._rules.rounds:
            yield self._goal(share, running)
            if not self._finite():
                yield self.lengths
                return
            running &= self._ahead(self._forecast()) @ self._copies < self._rules.budget + 1
        while True:
            forecast = self._forecast()
            first, done = self._leaders(forecast.h, 1), self.known == self.lengths
            winners = self._leaders(forecast.h, 0)
            certain = self._ahead(forecast)[np.ix_(done & ~winners, winners)].all()
            if not done[first].all():  # who seems to be among the first has to show it
                yield np.where(first, self.lengths, self.known)
            elif certain or done.all():
                return
            else:  # two that are known to their ends may change places with m, which depends on those that are not
                yield np.minimum(self.known + np.ceil(FURTHER * self.lengths).astype(np.int64), self.lengths)
            if not self._finite():
                yield self.lengths
                return

    def _ahead(self, forecast: Forecast) -> NDArray[np.bool_]:
        """``[K, K]`` whether the column's candidate is better than the line's by more than chance explains."""
        lead = forecast.h[None, :] - forecast.h[:, None]
        by_m = forecast.sd_m * (forecast.nll[None, :] - forecast.nll[:, None])
        chance = np.sqrt(forecast.sd[None, :] ** 2 + forecast.sd[:, None] ** 2 + by_m**2)
        return lead > self._rules.deviations * chance + MARGIN

    def _hard(self) -> Iterator[NDArray[np.int64]]:
        running = np.ones(len(self.lengths), dtype=bool)
        for share in self._rules.rounds:
            goal = self._goal(share, running)
            if self.known.any():  # those ahead count once all of them is known
                goal = np.where(self._leaders(self._forecast().h, 1), self.lengths, goal)
            yield goal
            if not self._finite():
                yield self.lengths
                return
            running &= self._surely_ahead() @ self._copies < self._rules.budget + 1
        winners = self._leaders(self._forecast().h, 0)
        if not (self._surely_ahead()[np.ix_(~winners, winners)]).all():
            yield self.lengths

    def _goal(self, share: float, running: NDArray[np.bool_]) -> NDArray[np.int64]:
        wanted = np.clip(np.ceil(share * self.lengths).astype(np.int64), np.minimum(FEWEST, self.lengths), self.lengths)
        return np.where(running, np.maximum(wanted, self.known), self.known)

    def _leaders(self, h: NDArray[np.float64], more: int) -> NDArray[np.bool_]:
        """The best candidates, as many as win and some more; copies are as many as they are."""
        order = np.argsort(-h, kind="stable")
        before = np.cumsum(self._copies[order]) - self._copies[order]
        leaders = np.zeros(len(h), dtype=bool)
        leaders[order[before < self._rules.budget + more]] = True
        return leaders

    def _surely_ahead(self) -> NDArray[np.bool_]:
        """``[K, K]`` whether the column's candidate is better than the line's, whatever the tokens to come are."""
        seen = ~np.isnan(self._nll)
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        nll, brier = (np.bincount(owner[seen], x[seen], len(self.lengths)) for x in (self._nll, self._brier))
        rest = self.lengths - self.known
        highest = brier + MOST_BRIER * rest
        weights = self._copies / self.lengths
        most = float(weights @ highest) / max(float(weights @ nll), np.finfo(float).tiny)
        least = most if not rest.any() else 0.0
        ahead = np.ones((len(rest), len(rest)), dtype=bool)
        for m in (least, most):
            best = (2 * highest - m * nll) / self.lengths
            own = (2 * brier - m * nll) / self.lengths
            ahead &= own[None, :] - best[:, None] > MARGIN * (1 + abs(m))
        return ahead & (rest == 0)[None, :]

    def _finite(self) -> bool:
        """Whether all that is known are numbers; where they are not, no forecast is worth anything."""
        place = np.arange(self._bounds[-1]) - np.repeat(self._bounds[:-1], self.lengths)
        seen = place < np.repeat(self.known, self.lengths)
        return bool(np.isfinite(self._nll[seen]).all() and np.isfinite(self._brier[seen]).all())


def replay(race: Race, nll: Sequence[ArrayLike], brier: Sequence[ArrayLike]) -> Outcome:
    """The race's outcome where all numbers are known already: of each candidate, ``[T]``."""
    while (asked := race.asks()) is not None:
        for candidate, (known, goal) in enumerate(zip(race.known.tolist(), asked.tolist(), strict=True)):
            if goal > known:
                race.take(candidate, nll[candidate][known:goal], brier[candidate][known:goal])
    return race.outcome()
