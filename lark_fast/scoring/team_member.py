"""A member of a ``Team``: a process that loads the student onto its device, and scores what it is given."""

import pickle
import queue
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lark_fast.batch import Batch, Sequences
from lark_fast.errors import UserError
from lark_fast.kernels.token_stats import TokenStats
from lark_fast.processes import Line
from lark_fast.racing.passes import RacePasses
from lark_fast.scoring.facts import Facts
from lark_fast.scoring.forward import Passes, Scored, Work
from lark_fast.scoring.local import LocalPasses
from lark_fast.scoring.run import ScoreConfig, load_scorer, students_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a member is told first: the run, its device, how many members there are."""

    config: ScoreConfig
    device: str
    members: int
    weights: list[str] | None = None  # their fingerprints; None: they are those of the same machine


class Entered(NamedTuple):
    """A problem whose race is to be run, see ``Entrant``."""

    race: str | None
    copies: Sequence[int]
    token_hashes: Sequence[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """A pass that it is given, or the candidates of a problem that are to race."""

    number: int
    sequences: Sequences
    step_starts: Sequence[NDArray[np.int32]] | None
    race: Entered | None


@dataclass(frozen=True, slots=True)
class Ready:
    """It has loaded the student."""

    facts: Facts
    where: str  # its machine, "" for the one that asked


@dataclass(frozen=True, slots=True)
class Refused:
    """It cannot load the student."""

    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """It cannot go on."""

    reason: str


@dataclass(frozen=True, slots=True)
class PieceDone:
    """A pass over pieces of trajectories is done, see ``LocalPasses``."""

    lengths: Sequence[int]
    n_scored: int
    work: Work


@dataclass(frozen=True, slots=True)
class RacePassDone:
    """A pass of a race is done, see ``RacePasses``."""

    starts: Sequence[int]
    lengths: Sequence[int]
    n_scored: int
    work: Work


class SentScore(NamedTuple):
    """A ``Scored`` on its way, with arrays: a tensor would take what it is a slice of along."""

    means: dict[str, float | None]
    n_tokens: int
    n_head: int
    tokens: TokenStats | None
    nll_after: NDArray[np.float32] | None

    @classmethod
    def of(cls, scored: Scored, with_tokens: bool) -> "SentScore":
        """Without its tokens' statistics where nobody asks for them."""
        tokens = scored.tokens.map(lambda values: values.numpy()) if with_tokens else None
        after = scored.nll_after.numpy() if with_tokens and scored.nll_after is not None else None
        return cls(scored.means, scored.n_tokens, scored.n_head, tokens, after)

    def unpacked(self) -> Scored:
        """As it was."""
        after = None if self.nll_after is None else torch.from_numpy(self.nll_after)
        tokens = self.tokens and self.tokens.map(torch.from_numpy)
        return Scored(self.means, self.n_tokens, self.n_head, tokens, after)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A pass, or part of one, is done."""

    job: int
    members: Sequence[int]  # of the pass, by their place in it
    scored: Sequence[SentScore] | None  # None: memory for a single sequence is not there
    work: Work


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """What a member calls a sequence."""

    job: int
    place: int
    step_starts: NDArray[np.int32] | None
    race: str | None
    copies: int
    token_hash: bytes


class TwoWay(Protocol):
    """How a member hears and speaks; see ``lark_fast.processes.Line``."""

    received: queue.SimpleQueue[bytes]

    def tell(self, pickled: bytes) -> None:
        """Send a message; does not wait for anybody."""


def serve(descriptor: int) -> None:
    """Be a member, until the parent is gone."""
    serve_on(Line(descriptor))


def serve_on(line: TwoWay, where: str = "") -> None:
    """Be a member, on the machine that is called so, as long as this process is there."""
    asked: Asked = pickle.loads(line.received.get())
    try:
        _serve(line, asked, where)
    except UserError as error:
        line.tell(pickle.dumps(Refused(f"{error} (on {where})" if where else str(error))))
    except BaseException as error:  # whatever it is, the parent is to say it
        traceback.print_exc()
        line.tell(pickle.dumps(Broken(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")))
    while True:
        line.received.get()  # the message is on its way; the parent ends this


def _serve(line: TwoWay, asked: Asked, where: str) -> None:
    config = replace(asked.config, device=asked.device)
    if config.device.startswith("cuda"):
        torch.cuda.set_device(config.device)
    scorer = load_scorer(config)
    if asked.weights not in (None, weights_of(config)):
        raise UserError(f"--student {config.student}: other weights or another config than where the command runs")
    line.tell(pickle.dumps(Ready(Facts.of(scorer), where)))
    with scorer.passes() as passes:
        runner, idle = passes, lambda: True
        if config.race is not None:

            def on_pass(starts: Sequence[int], lengths: Sequence[int], n_scored: int) -> None:
                line.tell(pickle.dumps(RacePassDone(starts, lengths, n_scored, passes.work)))

            sharing = asked.members if config.device == "cpu" and not where else 1  # those elsewhere are on any machine
            runner = RacePasses(passes, config.race, on_pass, sharing)
            idle = runner.idle
        elif config.local_steps is not None:

            def on_piece(lengths: Sequence[int], n_scored: int) -> None:
                line.tell(pickle.dumps(PieceDone(lengths, n_scored, passes.work)))

            runner = LocalPasses(passes, config.local_steps, lambda place: place.step_starts, on_piece)
        for batch, scored in runner.run(_pulled(line, passes, idle)):
            (job,) = {member.job for member in batch.members}
            result = Result(
                job=job,
                members=[member.place for member in batch.members],
                scored=scored and [SentScore.of(one, config.per_token) for one in scored],
                work=passes.work,
            )
            line.tell(pickle.dumps(result))


def weights_of(config: ScoreConfig) -> list[str]:
    """What identifies the student's weights, or those of its two states."""
    return [files.fingerprint()["weights"] for files in students_of(config)]


def _pulled(line: TwoWay, passes: Passes, idle: Callable[[], bool]) -> Iterator[Batch | None]:
    """The passes that it is given; None before it waits for one, and where something else is to be done meanwhile."""
    while True:
        if line.received.empty():
            yield None
            if not idle():
                continue
        given: Pulled = pickle.loads(line.received.get())
        n = len(given.sequences)
        starts = given.step_starts or [None] * n
        race, copies, hashes = given.race or Entered(None, [1] * n, [b""] * n)
        each = zip(starts, copies, hashes, strict=True)
        places = [_Place(given.number, place, steps, race, *of) for place, (steps, *of) in enumerate(each)]
        yield passes.layout.prepare(places, given.sequences)
