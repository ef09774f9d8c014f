"""The scoring engine: what the feed brings is cut into windows, scored pack by pack, and written, side by side.

    feed (worker processes) -> windows (a thread) -> forward passes, here or in other processes -> store (a thread)

Windows depend on the pool alone and packs on the window, so a run that was stopped anywhere makes the same ones again,
leaves out what the store has, and comes to the same numbers. Passes of all windows are one stream: none waits for the
last pass of the window before, and a window becomes a part once it and those before it are done.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lark_fast.batch import Batch
from lark_fast.flop import ForwardCost
from lark_fast.interrupts import Interrupts
from lark_fast.packing import windows
from lark_fast.scoring.feed import Trajectory, changed_text
from lark_fast.scoring.forward import Failed, Scored, Until, Work
from lark_fast.scoring.head_sampling import draw
from lark_fast.scoring.layout import Layout
from lark_fast.scoring.metrics import Account
from lark_fast.scoring.prefetch import Prefetched, prefetch
from lark_fast.scoring.store import Key, ScoreStore

WRITES_UNDER_WAY = 4
PATIENCE_SECONDS = 0.05  # for the next window, before passes under way are asked for their results


class Runner(Protocol):
    """What runs batches: ``Passes``, ``LocalPasses`` or a ``Team`` of processes.

    Attributes:
        layout: how they are put together.
        work: what has been done.
        ahead: windows to be made in advance; with 0, no pass is under way when the next one is asked for.
    """

    layout: Layout
    work: Work
    ahead: int

    def run(
        self, batches: Iterable[Batch | None], until: Until
    ) -> Iterator[tuple[Batch, list[Scored] | Failed | None]]:
        """The statistics of each batch's sequences, in any order, a batch whole or in pieces; see ``Passes.run``."""


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Trajectories of a window that have the same tokens, which pass through the student once.

    Attributes:
        window: its number.
        trajectories: those that are still to be scored, at least one.
        step_starts: see ``Trajectory``.
        race: the problem whose race they run in, see ``lark_fast.racing``; None: they are scored in full.
    """

    window: int
    trajectories: Sequence[Trajectory]
    step_starts: NDArray[np.int32] | None
    race: str | None = None

    @property
    def copies(self) -> int:
        """How many trajectories there are."""
        return len(self.trajectories)

    @property
    def token_hash(self) -> bytes:
        """Of their tokens."""
        return self.trajectories[0].token_hash


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Trajectories that become a part together.

    Attributes:
        number: counted from the first one of the run.
        keys: of all its trajectories, in the order of the pool.
        batches: forward passes still to be done, of units.
        start, end: how much of the pool had been read when it began and when it ended.
    """

    number: int
    keys: Sequence[Key]
    batches: Sequence[Batch]
    start: int
    end: int


def cut_windows(
    feed: Iterable[Trajectory],
    layout: Layout,
    unfinished: Mapping[Key, bytes],
    tokens_per_window: int,
    head_share: float | None = None,
) -> Iterator[Window]:
    """Windows of the feed, laid out for the device.

    Args:
        feed: trajectories in the order of the pool.
        layout: how passes are put together.
        unfinished: content_hash of those that are scored, in a window that was not closed.
        tokens_per_window: see ``lark_fast.packing.windows``.
        head_share: see ``head_sampling``; None: all scored positions meet the head.

    Raises:
        UserError: one of the unfinished has another text now.
    """
    cuts = windows(((item, len(item.input_ids)) for item in feed), max_tokens=tokens_per_window)
    for number, trajectories in enumerate(cuts):
        twins: dict[bytes, list[Trajectory]] = {}
        for item in trajectories:
            twins.setdefault(item.token_hash, []).append(item)
            if item.key in unfinished and unfinished[item.key] != item.content_hash:
                raise changed_text(item.source, item.line)
        batches = batches_in_full(list(twins.values()), layout, unfinished, number, head_share)
        keys = [item.key for item in trajectories]
        yield Window(number, keys, batches, trajectories[0].position, trajectories[-1].position)


def batches_in_full(
    twins: Sequence[Sequence[Trajectory]],
    layout: Layout,
    unfinished: Mapping[Key, bytes],
    number: int,
    head_share: float | None = None,
) -> list[Batch]:
    """Passes over whole trajectories of a window, but for those that are done.

    Args:
        twins: trajectories with the same tokens, each of which is one sequence.
        layout, unfinished, head_share: see ``cut_windows``.
        number: the window's.
    """
    batches = []
    # Planned with those that are done, so that a window that is taken up again has the same packs.
    for group in layout.plan([len(same[0].input_ids) for same in twins]):
        units, chosen = [], []
        for first, *others in (twins[place] for place in group):
            left = [item for item in (first, *others) if item.key not in unfinished]
            if left:
                units.append(Unit(number, left, first.step_starts))
                asked = first.labels if head_share is None else draw(first.labels, first.token_hash, head_share)
                chosen.append((first.input_ids, asked))
        if units:
            batches.append(layout.prepare(units, chosen))
    return batches


@dataclass(slots=True, eq=False)
class _Open:
    """A window that is not in a part yet."""

    window: Window
    left: int  # units
    tokens: int  # of its passes
    done: int = 0  # of these
    lost: list[tuple[Trajectory, str]] = field(default_factory=list)  # that could not be scored, and why


class Engine:
    """Scores what a feed brings into a store.

    Args:
        cost: the student's FLOP.
        store: open.
        account: kept up to date after every pass.
        row: the row of a trajectory, from its statistics.
        reject: what to do with a trajectory that cannot be scored, and the reason.
        progress: called with how much of the pool is done, before a window and after every pass.
    """

    def __init__(
        self,
        cost: ForwardCost,
        store: ScoreStore,
        account: Account,
        *,
        row: Callable[[Trajectory, Scored], dict[str, Any]],
        reject: Callable[[Trajectory, str], None],
        progress: Callable[[float], None],
    ) -> None:
        self.cost, self.store, self.account = cost, store, account
        self.row, self.reject, self.progress = row, reject, progress
        self._open: deque[_Open] = deque()
        self._behind = 0.0  # how much of the pool is in windows that are closed

    def run(self, cut: Iterator[Window], runner: Runner, interrupts: Interrupts) -> None:
        """Score every window.

        Raises:
            KeyboardInterrupt: asked to stop; the passes under way have been finished and are in the store.
            UserError: of the feed.
            OSError: of the store.
        """
        self._runner = runner
        with ThreadPoolExecutor(1, "writer") as thread, prefetch(cut, runner.ahead) as ahead:
            self._writer = _Writer(thread, self.account)
            try:
                with interrupts.held():
                    batches = self._batches(ahead, interrupts)
                    for batch, scored in runner.run(batches, interrupts.until_asked):
                        self._take(batch, scored)
            finally:
                self._writer.wait()  # a write that failed is to be told before all else

    def _batches(self, ahead: Prefetched[Window], interrupts: Interrupts) -> Iterator[Batch | None]:
        """The passes of all windows; None wherever the next window is not there yet."""
        while True:
            while not ahead.ready(PATIENCE_SECONDS):
                yield None
            # Where windows are made right here, that may take long, and no pass is under way.
            with nullcontext() if self._runner.ahead else interrupts.answered():
                window = next(ahead, None)
            if window is None:
                return
            self.account.waiting_seconds = ahead.waited_seconds
            self._open.append(
                _Open(
                    window,
                    left=sum(len(batch.members) for batch in window.batches),
                    tokens=sum(batch.n_tokens for batch in window.batches),
                )
            )
            self._close()
            self.progress(self._position())
            yield from window.batches

    def _take(self, batch: Batch, scored: Sequence[Scored] | Failed | None) -> None:
        first = self._open[0].window.number
        place = batch.members[0].window - first  # passes never reach across windows
        of = self._open[place]
        if scored is None or isinstance(scored, Failed):
            reason = scored.reason if scored else f"{batch.n_tokens} tokens do not fit into the device's memory"
            of.lost += [(item, reason) for unit in batch.members for item in unit.trajectories]
        else:
            self._writer.submit(self._append, batch, scored, place)
            self._count(batch, scored)
        of.left -= len(batch.members)
        of.done += batch.n_tokens
        self._close()
        self.progress(self._position())

    def _close(self) -> None:
        """Make parts of the windows that are done, in their order."""
        while self._open and not self._open[0].left:
            of = self._open.popleft()
            order = {key: place for place, key in enumerate(of.window.keys)}
            for item, reason in sorted(of.lost, key=lambda lost: order[lost[0].key]):
                self.reject(item, reason)
            for item, _ in of.lost:
                del order[item.key]
            self._writer.submit(self.store.close_window, list(order))
            self._behind = of.window.end

    def _position(self) -> float:
        """How much of the pool is done."""
        if not self._open:
            return self._behind
        shares = ((of.done / of.tokens if of.tokens else 1.0, of.window) for of in self._open)
        return self._open[0].window.start + sum(share * (window.end - window.start) for share, window in shares)

    def on_piece(self, lengths: Sequence[int], n_scored: int) -> None:
        """Count a pass over pieces of trajectories, see ``LocalPasses``."""
        self.account.local_tokens += sum(lengths)
        self.account.forward_flop += self.cost.flop(lengths, n_scored)
        self._count_work()
        self.progress(self._position())

    def on_race(self, starts: Sequence[int], lengths: Sequence[int], n_scored: int) -> None:
        """Count a pass over pieces of a race's candidates, see ``RacePasses``."""
        wholes = [start + length for start, length in zip(starts, lengths, strict=True)]
        self.account.passed_tokens += sum(lengths)
        self.account.forward_flop += self.cost.flop(wholes, n_scored) - self.cost.flop(starts, 0)
        self._count_work()
        self.progress(self._position())

    def _append(self, batch: Batch, scored: Sequence[Scored], ahead: int) -> None:
        rows = [
            self.row(item, one) for unit, one in zip(batch.members, scored, strict=True) for item in unit.trajectories
        ]
        self.store.append(rows, ahead)

    def _count(self, batch: Batch, scored: Sequence[Scored]) -> None:
        account = self.account
        self._count_work()
        for unit, length, one in zip(batch.members, batch.lengths, scored, strict=True):
            account.scored += len(unit.trajectories)
            account.input_tokens += len(unit.trajectories) * length
            account.scored_tokens += len(unit.trajectories) * one.n_tokens
            account.head_tokens += len(unit.trajectories) * one.n_head
        if batch.members[0].race is None:
            account.passed_tokens += batch.n_tokens
            account.forward_flop += self.cost.flop(batch.lengths, sum(one.n_head for one in scored))

    def _count_work(self) -> None:
        account, work = self.account, self._runner.work
        account.packs, account.padded_tokens = work.batches, work.padded_tokens
        account.device_seconds, account.out_of_memory = work.device_seconds, work.halvings
        account.lost_processes = work.losses


class _Writer:
    """Calls of the store, one after the other in a thread; what one of them raises comes out at a later call.

    Calls behind one that failed are left out: rows of the next window have no place in a window that is still open.
    """

    def __init__(self, thread: ThreadPoolExecutor, account: Account) -> None:
        self._thread, self._account, self._failed = thread, account, False
        self._under_way: deque[Future[None]] = deque()

    def submit(self, call: Callable[..., None], *arguments: Any) -> None:
        """Call it once all before it are done; waits where too many are not."""
        self._under_way.append(self._thread.submit(self._timed, call, *arguments))
        self.wait(WRITES_UNDER_WAY)

    def wait(self, left: int = 0) -> None:
        """Until no more than so many calls are under way."""
        while len(self._under_way) > left or (self._under_way and self._under_way[0].done()):
            self._under_way.popleft().result()

    def _timed(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        started = time.perf_counter()
        try:
            call(*arguments)
        except BaseException:
            self._failed = True
            raise
        self._account.write_seconds += time.perf_counter() - started
