"""``torchrun ... lark-fast score``: the ranks are one student that is larger than a GPU (``tensor_parallel.py``).

Rank 0 alone reads the pool, lays out passes, keeps the store, and speaks. Right before it runs a pass it tells the
others which, and they run it with it. So nothing has to be decided twice: whatever ends the run, rank 0 meets with it,
and the others hear of it between two passes.

A rank that is lost leaves the others waiting inside a pass. Then the run ends, and the same command goes on from the
store.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lark_fast.batch import Batch, Sequences
from lark_fast.errors import UserError
from lark_fast.scoring.feed import Trajectory
from lark_fast.scoring.layout import Layout
from lark_fast.scoring.local import LocalPasses
from lark_fast.scoring.place import Here, Listener
from lark_fast.scoring.run import ScoreConfig, chosen_dtype, load_scorer, open_place, score_in, students_of
from lark_fast.scoring.summary import ScoreSummary
from lark_fast.student import choose_device, dtype_on, load_tokenizer
from lark_fast.talk import LostRankError, Talk, lost_ranks
from lark_fast.world import started_by_torchrun

if TYPE_CHECKING:
    from lark_fast.scoring.engine import Runner
    from lark_fast.scoring.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Begin:
    """Load the student, in this precision."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Pass:
    """Run a pass over these."""

    sequences: Sequences


@dataclass(frozen=True, slots=True)
class End:
    """There is nothing more to do."""


def score_over_ranks(config: ScoreConfig) -> ScoreSummary | None:
    """A scoring run of the ranks that torchrun has started.

    Returns:
        Rank 0's summary; None on the others.

    Raises:
        UserError: on rank 0: as ``score_pool``; on another: what this rank alone has met with.
        KeyboardInterrupt: on rank 0.
        SystemExit: on another: a rank has ended, which has said why.
    """
    if fault := _fault(config):
        raise SystemExit(2) if int(os.environ["RANK"]) else UserError(fault)
    with started_by_torchrun(config.device) as (world, device):
        config = replace(config, device=device)
        if world.size == 1:
            return score_in(open_place, config)
        if world.main:
            with Leader(Talk()) as leader, lost_ranks():
                return score_in(leader.open_place, config)
        with _signals_left_to_rank_0():
            _follow(config, Talk())


def _fault(config: ScoreConfig) -> str | None:
    if config.devices is not None:
        return "--devices starts one process a GPU by itself, each with a whole student; leave it or torchrun away"
    if config.engine != "local":
        return f"--engine {config.engine}: finds its processes by itself; leave it or torchrun away"
    if config.device_map is not None:
        return f"--device-map {config.device_map}: spreads a student by itself; leave it or torchrun away"
    if config.after is not None:
        return "--before and --after: two students are for one process; leave torchrun away"
    if config.dry_run:
        return "--dry-run is for one process; leave torchrun away"
    if config.compile:
        return "--compile is for layers that are not cut over ranks; leave it or torchrun away"
    if config.precision is not None:
        return f"--precision {config.precision} is for layers that are not cut over ranks; leave it or torchrun away"
    return None


class Leader:
    """Rank 0, used in a ``with``, at whose end the others end too."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._heard = True  # the others listen; they do not while all are at something together

    def __enter__(self) -> "Leader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._heard:
            with suppress(LostRankError):
                self._talk.told(End())

    @contextmanager
    def open_place(self, config: ScoreConfig) -> Iterator["Spread"]:
        """The student, ready on all ranks."""
        dtype = dtype_on(choose_device(config.device), chosen_dtype(config))
        with self.together(Begin(dtype)):
            place = Spread(_load(config, self._talk, dtype), self)
        yield place

    @contextmanager
    def together(self, what: Begin | Pass) -> Iterator[None]:
        """Inside the block, all ranks are at this."""
        self._heard = False
        self._talk.told(what)
        yield
        self._heard = True  # not where it has failed here


class Spread(Here):
    """The student, spread over the ranks; a ``Place``."""

    def __init__(self, scorer: "Scorer", leader: Leader) -> None:
        super().__init__(scorer)
        self._leader = leader

    def rounding_cost(self, config: ScoreConfig, items: list[Trajectory]) -> None:
        """See ``Place``: the student in float32 may be too large."""

    @contextmanager
    def runner(self, config: ScoreConfig, listener: Listener) -> Iterator["Runner"]:
        """See ``Place``."""

        def together(batch: Batch) -> AbstractContextManager[None]:
            return self._leader.together(Pass(batch.sequences))

        with super().runner(config, listener) as runner:
            (runner.passes if isinstance(runner, LocalPasses) else runner).together = together
            yield runner


def _follow(config: ScoreConfig, talk: Talk) -> None:
    """Do what rank 0 says, until it says that there is nothing more."""
    try:
        told = talk.told()
        if isinstance(told, End):
            return
        with _load_quietly(config, talk, told.dtype).passes() as passes, lost_ranks():
            passes.together = nullcontext
            for _ in passes.run(_told_batches(talk, passes.layout)):
                pass
    except LostRankError as error:
        raise SystemExit(1) from error
    except UserError as error:
        raise UserError(f"rank {talk.rank}: {error}") from error


def _load(config: ScoreConfig, talk: Talk, dtype: str, **options: bool) -> "Scorer":
    """This rank's part of the student; what is not there for one of them, none can load."""

    def look() -> None:
        for files in students_of(config):
            files.refuse_torn()
            if talk.rank == 0:  # later the others would be waiting for it
                load_tokenizer(files, config.trust_remote_code)

    try:
        talk.done(look)
    except ValueError as error:
        raise UserError(str(error)) from error
    return load_scorer(config, dtype=dtype, tensor_parallel=True, **options)


def _load_quietly(config: ScoreConfig, talk: Talk, dtype: str) -> "Scorer":
    try:
        return _load(config, talk, dtype, tokenizer=False)
    except LostRankError:
        raise
    except UserError as error:  # all ranks meet with what one of them cannot load, and rank 0 says it
        raise SystemExit(2) from error


def _told_batches(talk: Talk, layout: Layout) -> Iterator[Batch]:
    while isinstance(told := talk.told(), Pass):
        yield layout.prepare(range(len(told.sequences)), told.sequences)


@contextmanager
def _signals_left_to_rank_0() -> Iterator[None]:
    """Ctrl-C reaches every process, and torchrun passes SIGTERM on to every rank."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
