"""The race of one problem: who is scored how far, round by round, and what is known of each at the end.

With a risk, a candidate stops when enough others, as many as can win, are ahead of its forecast by more than chance
explains. At risk 0 it stops when they are ahead whatever its remaining tokens are: of a token, 0 <= brier <= 2 and
0 <= nll, so that

    h = 2 brier - m nll  <=  (2 sum of scored brier + 4 rest - m sum of scored nll) / T,

and since m depends on tokens that nobody has seen, this has to hold for every m that they leave open, from 0 on. The
bound is linear in m, so that its ends tell; those ahead must have been scored in full, for nothing bounds an nll.

With a sample, the head reads only that part of the tokens which the body has come to. What it has passed over is
forecast as what is still to come is. Who is in the running at the end of its text is read in full then.

Winners and the one behind them, which sets the threshold, are scored in full in any case.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lark_fast.racing.bernstein import BernsteinForecaster
from lark_fast.racing.forecast import Forecast, Forecaster
from lark_fast.racing.rules import FEWEST, RaceRules
from lark_fast.scoring.head_sampling import sample_rows
from lark_fast.scoring.learnability import g_hat

FORECASTERS = {"normal": Forecaster, "bernstein": BernsteinForecaster}
MOST_BRIER = 2.0
FURTHER = 0.2  # of their lengths, that those who have stopped are scored on where m has to be known better
MARGIN = 1e-9  # of sums in another order


class Outcome(NamedTuple):
    """Of each candidate, ``[K]``."""

    reached: NDArray[np.int64]  # scored tokens that the body has come to
    known: NDArray[np.int64]  # of these, those that the head has read: all, but for a sample
    nll: NDArray[np.float64]  # means; forecast where not all is known
    brier: NDArray[np.float64]
    winner: NDArray[np.bool_]


class _Goal(NamedTuple):
    """What is to be known next, ``[K]``."""

    reach: NDArray[np.int64]  # the first tokens of each candidate
    in_full: NDArray[np.bool_]  # all of these, or those of the sample


class Race:
    """Run it: ``while (asked := race.asks()) is not None``: score these tokens, and ``take`` what comes of them.

    Args:
        words, before, copies: see ``Forecaster``.
        rules: what it is run by.
        forecasts: what makes forecasts; None: what the rules say.
        samples: of each candidate, the tokens that the head reads while it is running, places among those that are
            scored, rising; None: it reads all.

    Attributes:
        lengths: ``[K]`` scored tokens of each candidate.
        reached: ``[K]`` of these, how many lie up to the last one that is known.
    """

    def __init__(
        self,
        words: Sequence[ArrayLike],
        before: Sequence[ArrayLike],
        copies: ArrayLike,
        rules: RaceRules,
        forecasts: type[Forecaster] | None = None,
        samples: Sequence[ArrayLike] | None = None,
    ) -> None:
        bounds = rules.bounds if rules.risk else "normal"  # hard ones ask forecasts for means alone
        self._forecaster = (forecasts or FORECASTERS[bounds])(words, before, copies, rules)
        self._copies, self._rules = np.asarray(copies), rules
        self.lengths = self._forecaster.lengths
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        self._slices = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self._nll, self._brier = (np.full(ends[-1], np.nan) for _ in range(2))
        self._seen = np.zeros(ends[-1], dtype=bool)
        self._sampled = np.full(ends[-1], samples is None)
        for own, chosen in zip(self._slices, samples or (), strict=False):
            self._sampled[own][np.asarray(chosen, dtype=np.int64)] = True
        self._least = np.array([_place_of(self._sampled[own], FEWEST) for own in self._slices])
        self.reached, self._asked = (np.zeros(len(self.lengths), dtype=np.int64) for _ in range(2))
        self._course = self._hard() if rules.risk == 0 else self._soft()

    def asks(self) -> list[NDArray[np.int64]] | None:
        """Of each candidate, the tokens that are to be known next, rising; None: the race is over."""
        for goal in self._course:
            self._asked = np.maximum(self._asked, goal.reach)
            wanted = [self._wanted(k, goal) for k in range(len(self.lengths))]
            if any(map(len, wanted)):
                return wanted
        return None

    def _wanted(self, candidate: int, goal: _Goal) -> NDArray[np.int64]:
        own = self._slices[candidate]
        reach = slice(own.start, own.start + int(goal.reach[candidate]))
        asked = ~self._seen[reach]
        return np.flatnonzero(asked if goal.in_full[candidate] else asked & self._sampled[reach])

    def take(self, candidate: int, tokens: ArrayLike, nll: ArrayLike, brier: ArrayLike) -> None:
        """What has come of some of a candidate's tokens."""
        own, tokens = self._slices[candidate], np.asarray(tokens, dtype=np.int64)
        self._nll[own][tokens], self._brier[own][tokens], self._seen[own][tokens] = nll, brier, True
        self.reached[candidate] = max(self.reached[candidate], tokens.max(initial=-1) + 1)

    @property
    def known(self) -> NDArray[np.int64]:
        """``[K]`` how many scored tokens are known."""
        return self._forecaster.count(self._seen)

    def outcome(self) -> Outcome:
        """What is known at the end."""
        if self._finite():
            forecast = self._forecast()
            return self._as_outcome(forecast.nll, forecast.brier, forecast.h)
        # All have been scored to their ends, and those whose numbers are none take no part.
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        nll, brier = (np.bincount(owner, x) / self.lengths for x in (self._nll, self._brier))
        of = np.repeat(np.arange(len(nll)), self._copies)
        energies = g_hat(nll[of], brier[of], np.zeros(len(of)))[np.cumsum(self._copies) - 1]
        return self._as_outcome(nll, brier, energies)

    def _as_outcome(self, nll: NDArray[np.float64], brier: NDArray[np.float64], order: NDArray[np.float64]) -> Outcome:
        return Outcome(self.reached.copy(), self.known, nll, brier, self._leaders(order, 0))

    def _forecast(self) -> Forecast:
        return self._forecaster(self._seen, self._nll, self._brier)

    def _soft(self) -> Iterator[_Goal]:
        running = np.ones(len(self.lengths), dtype=bool)
        for share, in_full in (*((share, False) for share in self._rules.rounds), (1.0, True)):
            yield self._goal(share, running, in_full)
            if not self._finite():
                yield self._all()
                return
            running &= self._ahead(self._forecast()) @ self._copies < self._rules.budget + 1
        while True:
            forecast = self._forecast()
            first, done = self._leaders(forecast.h, 1), self.known == self.lengths
            winners = self._leaders(forecast.h, 0)
            certain = self._ahead(forecast)[np.ix_(done & ~winners, winners)].all()
            if not done[first].all():  # who seems to be among the first has to show it
                yield _Goal(np.where(first, self.lengths, self._asked), first)
            elif certain or done.all():
                return
            else:  # two that are known to their ends may change places with m, which depends on those that are not
                further = self._asked + np.ceil(FURTHER * self.lengths).astype(np.int64)
                yield _Goal(np.minimum(further, self.lengths), self._asked == self.lengths)
            if not self._finite():
                yield self._all()
                return

    def _ahead(self, forecast: Forecast) -> NDArray[np.bool_]:
        """``[K, K]`` whether the column's candidate is better than the line's by more than chance explains."""
        lead = forecast.h[None, :] - forecast.h[:, None]
        by_m = forecast.sd_m * (forecast.nll[None, :] - forecast.nll[:, None])
        chance = np.sqrt(forecast.sd[None, :] ** 2 + forecast.sd[:, None] ** 2 + by_m**2)
        return lead > self._forecaster.quantile * chance + MARGIN

    def _hard(self) -> Iterator[_Goal]:
        running = np.ones(len(self.lengths), dtype=bool)
        for share in self._rules.rounds:
            goal = self._goal(share, running, in_full=True)
            if self._seen.any():  # those ahead count once all of them is known
                goal = goal._replace(reach=np.where(self._leaders(self._forecast().h, 1), self.lengths, goal.reach))
            yield goal
            if not self._finite():
                yield self._all()
                return
            running &= self._surely_ahead() @ self._copies < self._rules.budget + 1
        winners = self._leaders(self._forecast().h, 0)
        if not (self._surely_ahead()[np.ix_(~winners, winners)]).all():
            yield self._all()

    def _all(self) -> _Goal:
        return _Goal(self.lengths, np.ones(len(self.lengths), dtype=bool))

    def _goal(self, share: float, running: NDArray[np.bool_], in_full: bool) -> _Goal:
        wanted = np.clip(np.ceil(share * self.lengths).astype(np.int64), self._least, self.lengths)
        return _Goal(np.where(running, np.maximum(wanted, self._asked), self._asked), running & in_full)

    def _leaders(self, h: NDArray[np.float64], more: int) -> NDArray[np.bool_]:
        """The best candidates, as many as win and some more; copies are as many as they are."""
        order = np.argsort(-h, kind="stable")
        before = np.cumsum(self._copies[order]) - self._copies[order]
        leaders = np.zeros(len(h), dtype=bool)
        leaders[order[before < self._rules.budget + more]] = True
        return leaders

    def _surely_ahead(self) -> NDArray[np.bool_]:
        """``[K, K]`` whether the column's candidate is better than the line's, whatever the tokens to come are."""
        seen = self._seen
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
        return bool(np.isfinite(self._nll[self._seen]).all() and np.isfinite(self._brier[self._seen]).all())


def draw_samples(
    rules: RaceRules, lengths: Iterable[int], token_hashes: Iterable[bytes]
) -> list[NDArray[np.int64]] | None:
    """``samples`` of a race by its rules, of candidates with so many scored tokens each."""
    share = rules.head_share
    if share is None:
        return None
    return [sample_rows(n, share, digest) for n, digest in zip(lengths, token_hashes, strict=True)]


def _place_of(sampled: NDArray[np.bool_], number: int) -> int:
    """How many of the first tokens have so many of the sample; all where it has no more."""
    places = np.flatnonzero(sampled)
    return int(places[number - 1]) + 1 if len(places) >= number else len(sampled)


def replay(race: Race, nll: Sequence[ArrayLike], brier: Sequence[ArrayLike]) -> Outcome:
    """The race's outcome where all numbers are known already: of each candidate, ``[T]``."""
    while (asked := race.asks()) is not None:
        for candidate, tokens in enumerate(asked):
            if len(tokens):
                race.take(candidate, tokens, np.asarray(nll[candidate])[tokens], np.asarray(brier[candidate])[tokens])
    return race.outcome()
