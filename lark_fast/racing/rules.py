"""What a race is run by."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

from lark_fast.hashing import draw

DEFAULT_RISK = 0.05
HIGHEST_RISK = 0.5
AUDITED = 0.1  # of the problems
AUDIT_SEED = 0
# Shares of a trajectory's scored tokens that are known at the end of a round. A model that keeps what it has seen pays
# nothing for more rounds; each is a chance to stop. Hard bounds stop nobody before the very end.
ROUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LAST_ROUNDS = (0.9, 0.95, 0.97, 0.98, 0.99, 1.0)
FEWEST = 32  # scored tokens of a first round
# Scored tokens of a problem's candidates, their mean. With fewer, a round is less than FEWEST, and passes are so small
# that a race takes longer than none (docs/log.md).
SHORTEST = 10 * FEWEST


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceRules:
    """What a race is run by.

    Attributes:
        budget: how many candidates of a problem win.
        risk: that one of them is stopped, per problem; 0: hard bounds alone.
        head_share: of the scored tokens of those who are running, the head reads this share, see ``head_sampling``;
            winners are read in full. None: it reads all.
        bounds: how the errors of forecasts are bounded, "normal" (``forecast.py``) or "bernstein" (``bernstein.py``).
    """

    budget: int
    risk: float = DEFAULT_RISK
    head_share: float | None = None
    bounds: str = "normal"

    @property
    def rounds(self) -> tuple[float, ...]:
        """See ``ROUNDS``."""
        return ROUNDS if self.risk else LAST_ROUNDS

    @property
    def deviations(self) -> float:
        """How many standard deviations a winner's lead has to be: its chance is the risk's share of each winner."""
        return NormalDist().inv_cdf(1 - self.risk / self.budget)

    def races(self, candidates: int) -> bool:
        """Whether there is anybody to stop: winners and the one behind them are scored in full."""
        return candidates > self.budget + 1

    @staticmethod
    def long_enough(scored_tokens: Sequence[int]) -> bool:
        """Whether a race can pay, of candidates with so many scored tokens each."""
        return sum(scored_tokens) >= SHORTEST * len(scored_tokens)

    def audits(self, problem: str) -> bool:
        """Whether a problem is scored in full, to see what the race would have got wrong."""
        return self.risk > 0 and int.from_bytes(draw(AUDIT_SEED, problem), "big") < AUDITED * 2**64

    def as_json(self) -> dict[str, Any]:
        """What decides the numbers, as a store's identity has it."""
        always = {"budget": self.budget, "risk": self.risk}  # the others came later, and stores do not have them
        return always | {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in always and getattr(self, field.name) != field.default
        }
