"""Where the student is: in this process, or in one process a device (``team.py``)."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from lark_fast.racing.passes import RacePasses
from lark_fast.rendering.renderer import Renderer, RenderOptions
from lark_fast.scoring.facts import Facts
from lark_fast.scoring.feed import Trajectory
from lark_fast.scoring.local import LocalPasses
from lark_fast.scoring.precision import Fp8Cost, RoundingCost, fp8_cost, rounding_cost

if TYPE_CHECKING:
    from lark_fast.scoring.engine import Runner
    from lark_fast.scoring.run import ScoreConfig
    from lark_fast.scoring.scorer import Scorer


class Listener(Protocol):
    """What hears of passes that are no trajectory's own: an ``Engine``."""

    def on_piece(self, lengths: Sequence[int], n_scored: int) -> None:
        """Of a pass that local scores have taken, see ``LocalPasses``."""

    def on_race(self, starts: Sequence[int], lengths: Sequence[int], n_scored: int) -> None:
        """Of a pass of a race, see ``RacePasses``."""


class Place(Protocol):
    """A student that is ready, with what goes with it.

    Attributes:
        facts: what there is to know of it.
        devices: how many there are of it, each on a device of its own.
        beside: of these, those whose processes take cores of this machine.
        renderer: makes token ids for it.
        options: how it renders, within the student's positions.
    """

    facts: Facts
    devices: int
    beside: int
    renderer: Renderer
    options: RenderOptions

    def runner(self, config: "ScoreConfig", listener: Listener) -> AbstractContextManager["Runner"]:
        """Forward passes, with local scores or as races where the run asks for them.

        Args:
            config: of the run.
            listener: hears of the passes that these take.
        """

    def rounding_cost(self, config: "ScoreConfig", items: Sequence[Trajectory]) -> "RoundingCost | None":
        """What the student's precision costs on a sample, or None where it is not measured; see ``precision``."""

    def fp8_cost(self, items: Sequence[Trajectory]) -> "Fp8Cost | None":
        """What FP8 costs on a sample, or None where it is not measured; before ``runner``."""


class Here:
    """The student in this process."""

    devices = beside = 1

    def __init__(self, scorer: "Scorer") -> None:
        self.scorer, self.facts = scorer, Facts.of(scorer)
        self.renderer, self.options = scorer.renderer, scorer.options

    def idle_gpus(self, device: str) -> int:
        """How many GPUs there are beside the one that nobody has chosen by name."""
        return torch.cuda.device_count() - 1 if self.facts.device_type == "cuda" and ":" not in device else 0

    def rounding_cost(self, config: "ScoreConfig", items: Sequence[Trajectory]) -> "RoundingCost | None":
        """See ``Place``."""
        return rounding_cost(self.scorer, items, config.trust_remote_code)

    def fp8_cost(self, items: Sequence[Trajectory]) -> "Fp8Cost | None":
        """See ``Place``."""
        return fp8_cost(self.scorer, items)

    @contextmanager
    def runner(self, config: "ScoreConfig", listener: Listener) -> Iterator["Runner"]:
        """See ``Place``."""
        if self.scorer.fp8 is not None:  # nothing is scored without it from here on
            self.scorer.fp8.let_go()
        with self.scorer.passes() as passes:
            if config.race is not None:
                yield RacePasses(passes, config.race, listener.on_race)
            elif config.local_steps is not None:
                yield LocalPasses(passes, config.local_steps, lambda unit: unit.step_starts, listener.on_piece)
            else:
                yield passes
