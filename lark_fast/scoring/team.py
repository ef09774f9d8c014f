"""One process a device, each with the student: they pull passes from one queue, and nothing waits for the slowest.

There is no collective call. A process holds nothing but the passes it has been given, so when one is lost (killed, out
of memory, its GPU gone) the others get these, and another one is started in its place. Which process has scored a
pass, and how many there are, changes no score: the passes are those that one process would make.
"""

import itertools
import os
import pickle
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Protocol

import torch

from lark_fast.batch import Batch
from lark_fast.errors import UserError
from lark_fast.processes import ChildProcess, LostProcessError
from lark_fast.rendering.renderer import Renderer
from lark_fast.scoring.facts import Facts
from lark_fast.scoring.feed import Trajectory
from lark_fast.scoring.forward import Failed, Scored, Until, Work
from lark_fast.scoring.place import Listener
from lark_fast.scoring.run import ScoreConfig, students_of
from lark_fast.scoring.team_member import (
    Asked,
    Broken,
    Entered,
    PieceDone,
    Pulled,
    RacePassDone,
    Ready,
    Refused,
    Result,
    serve,
)
from lark_fast.student import load_tokenizer

MOST_LOSSES = 3  # processes that a pass may cost, before its trajectories are tried singly; and one of these
# Processes that a device may lose in a row, before it is left out. More than one bad trajectory costs; fewer where they
# do not even load the student.
MOST_FAILURES, FAILURES_OF_A_START = 9, 3
WINDOWS_AHEAD = 2
_END = object()


@dataclass(slots=True, eq=False)
class _Job:
    """A pass that is to be done."""

    number: int
    batch: Batch
    losses: int = 0  # processes that were lost at it
    left: set[int] = field(default_factory=set)  # of its members, those without a result


class Process(Protocol):
    """A member's process, as ``lark_fast.processes.ChildProcess`` is one."""

    def send(self, pickled: bytes) -> None:
        """Send it something; does not wait for its work."""

    def receive(self) -> object:
        """Its next message; ``LostProcessError`` where it is gone."""

    def kill(self) -> None:
        """End it, whatever it is doing."""

    def wait(self) -> None:
        """Wait for its end."""


class Crew(Protocol):
    """Where the processes of a team come from."""

    def name(self, number: int, device: str) -> str:
        """What users read of the member of that number."""

    def beside(self, members: int) -> int:
        """How many of so many members take cores of this machine."""

    def start(self, asked: Asked) -> Process:
        """A process that has been told that; ``UserError`` where there can be none."""

    def speaking(self, processes: Sequence[Process], seconds: float | None) -> list[Process]:
        """Those of which a message can be received; waits for one, so many seconds at most."""


class OwnProcesses:
    """Processes of this machine."""

    def name(self, number: int, device: str) -> str:
        """See ``Crew``."""
        return f"the process on {device}"

    def beside(self, members: int) -> int:
        """See ``Crew``."""
        return members

    def start(self, asked: Asked) -> ChildProcess:
        """See ``Crew``."""
        cores = os.cpu_count() or 1
        environment = {"TOKENIZERS_PARALLELISM": "false"}
        if asked.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, cores // asked.members))
        try:
            process = ChildProcess(serve, environment)
        except OSError as error:
            raise UserError(f"no process can be started for {asked.device} ({error}); use fewer --devices") from error
        process.send(pickle.dumps(asked))
        return process

    def speaking(self, processes: Sequence[ChildProcess], seconds: float | None) -> list[ChildProcess]:
        """See ``Crew``."""
        ends = {process.connection: process for process in processes}
        return [ends[connection] for connection in wait(list(ends), seconds)]


class _Member:
    """A device and the process that drives it."""

    def __init__(self, asked: Asked, crew: Crew, number: int) -> None:
        self.asked, self.crew, self._name = asked, crew, crew.name(number, asked.device)
        self.where = ""  # its machine, where it is not this one
        self.jobs: deque[_Job] = deque()  # that it has, in the order in which it begins them
        self.failures = 0  # in a row
        self.facts: Facts | None = None  # None: not ready
        self.work = Work()  # of this process
        self.process: Process | None = None

    def start(self) -> None:
        """Start its process, anew if need be."""
        self.facts, self.work = None, Work()
        self.process = self.crew.start(self.asked)

    @property
    def name(self) -> str:
        """What users read of it."""
        return f"{self._name} on {self.where}" if self.where else self._name

    @property
    def room(self) -> int:
        """How many passes more it should have: the next ones are there before the one in hand is done."""
        if self.facts is None:
            return 0
        passes = 3 if self.facts.device_type == "cuda" else 2
        if self.asked.config.race is not None:  # whole problems, which take their time: nobody is to wait for the last
            passes -= 1
        return passes - len(self.jobs)

    def take(self, job: _Job, with_steps: bool) -> None:
        """Give it a pass."""
        units = job.batch.members
        starts = [unit.step_starts for unit in units] if with_steps else None
        race = units[0].race
        if race is not None:
            race = Entered(race, [unit.copies for unit in units], [unit.token_hash for unit in units])
        job.left = set(range(len(units)))
        self.jobs.append(job)
        pulled = Pulled(number=job.number, sequences=job.batch.sequences, step_starts=starts, race=race)
        self.process.send(pickle.dumps(pulled))

    def end(self) -> None:
        """Kill its process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Team:
    """A ``Place`` and its ``Runner``; used in a ``with``, at whose end the processes are gone.

    Args:
        config: of the run; each member loads the student as it says.
        devices: a process each.
        crew: starts the processes; None: on this machine.
        weights: see ``Asked``.

    Raises:
        UserError: on entering: no member could load the student.
    """

    ahead = WINDOWS_AHEAD

    def __init__(
        self, config: ScoreConfig, devices: Sequence[str], crew: Crew | None = None, weights: list[str] | None = None
    ) -> None:
        self._config, self._crew, self.devices = config, crew or OwnProcesses(), len(devices)
        self.beside = self._crew.beside(self.devices)
        self._members = [
            _Member(Asked(config=config, device=device, members=len(devices), weights=weights), self._crew, number)
            for number, device in enumerate(devices, 1)
        ]
        self._again: deque[_Job] = deque()  # passes whose process was lost
        self._failed: list[tuple[Batch, Failed]] = []
        self._numbers = itertools.count()
        self._jobs: dict[int, _Job] = {}
        self._gone = Work()  # of processes that were lost
        self._refusals: list[str] = []
        self.facts: Facts | None = None

    def __enter__(self) -> "Team":
        try:
            for member in self._members:
                member.start()
            while self.facts is None:
                self._hear(None)
            self.layout = self.facts.layout()
            self.options = self._config.options.fitting(self.facts.max_positions)
            tokenizer = load_tokenizer(students_of(self._config)[0], self._config.trust_remote_code)
            self.renderer = Renderer(
                tokenizer,
                self.options,
                vocab_size=self.facts.vocab_size,
                chat_template=self._config.chat_template,
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            member.end()

    @property
    def work(self) -> Work:
        """What all of them have done."""
        return sum((member.work for member in self._members), self._gone)

    def rounding_cost(self, config: ScoreConfig, items: Sequence[Trajectory]) -> None:
        """See ``Place``: it takes a process that has loaded the student twice."""

    def fp8_cost(self, items: Sequence[Trajectory]) -> None:
        """See ``Place``: as above."""

    @contextmanager
    def runner(self, _: ScoreConfig, listener: Listener) -> Iterator["Team"]:
        """See ``Place``."""
        self._listener = listener
        yield self

    def run(
        self, batches: Iterable[Batch | None], until: Until = iter
    ) -> Iterator[tuple[Batch, list[Scored] | Failed | None]]:
        """See ``Runner``. Passes go to whoever has the fewest, results come back as they are there."""
        source, more = until(batches), True
        while True:
            patience = None  # until somebody has a result
            while member := self._freest():
                if self._again:
                    member.take(self._again.popleft(), self._config.local_steps is not None)
                    continue
                batch = next(source, _END) if more else _END
                if batch is _END:
                    more = False
                    break
                if batch is None:
                    patience = 0.0  # what is to be done next is being made, and has been waited for
                    break
                job = _Job(next(self._numbers), batch)
                self._jobs[job.number] = job
                member.take(job, self._config.local_steps is not None)
            if not (more or self._jobs):
                return
            yield from self._hear(patience)
            yield from self._failed
            self._failed.clear()

    def _freest(self) -> _Member | None:
        return max((member for member in self._members if member.room > 0), key=lambda one: one.room, default=None)

    def _hear(self, seconds: float | None) -> list[tuple[Batch, list[Scored] | None]]:
        """What the members say, within so many seconds."""
        listening = {member.process: member for member in self._members if member.process is not None}
        results = []
        for process in self._crew.speaking(list(listening), seconds):
            member = listening[process]
            try:
                said = member.process.receive()
            except LostProcessError as lost:
                self._lose(member, lost.how)
                continue
            match said:
                case Ready():
                    self._welcome(member, said)
                case Refused():
                    self._refuse(member, said.reason)
                case Broken():
                    self._lose(member, f"failed ({said.reason})")
                case PieceDone():
                    member.work = said.work
                    self._listener.on_piece(said.lengths, said.n_scored)
                case RacePassDone():
                    member.work = said.work
                    self._listener.on_race(said.starts, said.lengths, said.n_scored)
                case Result():
                    member.work = said.work
                    results.append(self._take(member, said))
        return results

    def _take(self, member: _Member, result: Result) -> tuple[Batch, list[Scored] | None]:
        job = self._jobs[result.job]
        batch = job.batch
        if list(result.members) != list(range(len(batch.members))):  # in pieces, or laid out anew
            parts = ([whole[place] for place in result.members] for whole in (batch.members, batch.sequences))
            batch = self.layout.prepare(*parts)
        job.left.difference_update(result.members)
        if not job.left:
            member.jobs.remove(job)
            member.failures = 0
            del self._jobs[job.number]
        return batch, None if result.scored is None else [one.unpacked() for one in result.scored]

    def _welcome(self, member: _Member, ready: Ready) -> None:
        facts, self.facts = ready.facts, self.facts or ready.facts
        if facts.dtype != self.facts.dtype:
            where = ready.where or member.asked.device
            raise UserError(
                f"--devices: the student is in {facts.dtype} on {where} and in {self.facts.dtype} on others; "
                "say which with --dtype"
            )
        if facts.precision != self.facts.precision:
            where = ready.where or member.asked.device
            raise UserError(f"--devices: some can multiply in FP8 and some cannot ({where}); leave --precision away")
        member.facts, member.where = facts, ready.where

    def _refuse(self, member: _Member, reason: str) -> None:
        """It cannot load the student."""
        self._refusals.append(reason)
        self._leave_out(member, reason)

    def _lose(self, member: _Member, how: str) -> None:
        """Its process is gone; what it had is done by others."""
        member.end()
        self._gone += replace(member.work, losses=1)
        if member.jobs:
            member.jobs[0].losses += 1
        for job in reversed(member.jobs):
            self._again.extendleft(reversed(self._to_be_done_again(job, how)))
        member.jobs.clear()
        member.failures += 1 if member.facts is not None else FAILURES_OF_A_START
        if member.failures >= MOST_FAILURES:
            self._leave_out(member, f"its process {how}, time and again")
            return
        _say(f"{member.name} {how}: its passes are done again, and another one is started")
        member.start()

    def _to_be_done_again(self, job: _Job, how: str) -> list[_Job]:
        """What is left of a pass whose process was lost; what is not the whole of a problem runs in no race."""
        batch, places = job.batch, sorted(job.left)
        if job.losses < MOST_LOSSES and len(places) == len(batch.members):
            return [job]
        del self._jobs[job.number]
        units = [replace(unit, race=None) for unit in batch.members]
        if job.losses == MOST_LOSSES and len(places) == 1:
            alone = self.layout.prepare([units[places[0]]], [batch.sequences[places[0]]])
            self._failed.append((alone, Failed(f"the process that scored it {how}, {MOST_LOSSES} times")))
            return []
        groups = [places] if job.losses < MOST_LOSSES else [[place] for place in places]
        jobs = []
        for group in groups:
            parts = ([whole[place] for place in group] for whole in (units, batch.sequences))
            losses = job.losses if group is places else 0
            jobs.append(_Job(next(self._numbers), self.layout.prepare(*parts), losses))
            self._jobs[jobs[-1].number] = jobs[-1]
        return jobs

    def _leave_out(self, member: _Member, why: str) -> None:
        member.end()
        member.facts = None
        if not any(other.process is not None for other in self._members):
            raise UserError(self._refusals[0] if self._refusals else f"--devices: {member.name} is lost: {why}")
        _say(f"{member.name} is left out: {why}")


def choose_devices(devices: str, device: str) -> list[str]:
    """The devices that a run takes.

    Args:
        devices: "all", how many, or names with commas between them: "0,2", "cuda:0,cuda:2", "cuda:1,".
        device: "auto", "cuda" or "cpu": what kind, where ``devices`` does not say. On a CPU a number is one of
            processes.

    Raises:
        UserError: they are not there.
    """
    wanted = f"--devices {devices}"
    if "," in devices:
        names = [name.strip() for name in devices.split(",") if name.strip()]
        names = [f"cuda:{name}" if name.isdecimal() else name for name in names]
        for name in names:
            _refuse_missing(name, wanted)
        if len(set(names) - {"cpu"}) < len([name for name in names if name != "cpu"]) or not names:
            raise UserError(f"{wanted}: each GPU once, as in --devices 0,1")
        return names
    if devices != "all" and not (devices.isdecimal() and int(devices) > 0):
        raise UserError(f"{wanted}: not all, a number, or names as in 0,2")
    if ":" in device:
        raise UserError(f"{wanted}: goes with --device cuda or cpu, not with one GPU ({device})")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cpu" or (device == "auto" and not gpus):
        if devices == "all":
            raise UserError(f"{wanted}: no GPU is there; --device cpu takes a number of processes")
        return ["cpu"] * int(devices)
    number = gpus if devices == "all" else int(devices)
    if number > gpus or not gpus:
        raise UserError(f"{wanted}: this machine has {gpus} GPUs")
    return [f"cuda:{place}" for place in range(number)]


def _refuse_missing(name: str, wanted: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{wanted}: no device is called {name}; names are as in cuda:0,cuda:1 or 0,1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{wanted}: {name} is not there, this machine has {torch.cuda.device_count()} GPUs")
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"{wanted}: {name} is neither a GPU nor cpu")


def _say(text: str) -> None:
    print(f"lark-fast: {text}", file=sys.stderr)
