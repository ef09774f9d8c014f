"""The scoring engine: what the feed brings is cut into windows, scored pack by pack, and written, side by side.

    feed (worker processes) -> windows (a thread, one ahead) -> forward passes -> store (a thread)

Windows depend on the pool alone and packs on the window, so a run that was stopped anywhere makes the same ones again,
leaves out what the store has, and comes to the same numbers.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lark_fast.batch import Batch
from lark_fast.flop import ForwardCost
from lark_fast.interrupts import Interrupts
from lark_fast.packing import windows
from lark_fast.scoring.feed import Trajectory, changed_text
from lark_fast.scoring.forward import Passes, Scored
from lark_fast.scoring.local import LocalPasses
from lark_fast.scoring.metrics import Account
from lark_fast.scoring.prefetch import prefetch
from lark_fast.scoring.store import Key, ScoreStore

WRITES_UNDER_WAY = 4


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Trajectories that are scored together.

    Attributes:
        trajectories: in the order of the pool.
        batches: forward passes still to be done; their members are indices of ``trajectories``, each the first of those
            with its tokens.
        twins: by such an index, all that have its tokens and are still to be scored.
        start, end: how much of the pool had been read when it began and when it ended.
    """

    trajectories: Sequence[Trajectory]
    batches: Sequence[Batch]
    twins: Mapping[int, Sequence[int]]
    start: int
    end: int


def cut_windows(
    feed: Iterable[Trajectory], passes: Passes, unfinished: Mapping[Key, bytes], tokens_per_window: int
) -> Iterator[Window]:
    """Windows of the feed, laid out for the device.

    Args:
        feed: trajectories in the order of the pool.
        passes: plans and lays out.
        unfinished: content_hash of those that are scored, in a window that was not closed.
        tokens_per_window: see ``lark_fast.packing.windows``.

    Raises:
        UserError: one of the unfinished has another text now.
    """
    for trajectories in windows(((item, len(item.input_ids)) for item in feed), max_tokens=tokens_per_window):
        first: dict[bytes, int] = {}
        twins: dict[int, list[int]] = {}
        for index, item in enumerate(trajectories):
            own = first.setdefault(item.token_hash, index)
            of_token = twins.setdefault(own, [])
            if item.key not in unfinished:
                of_token.append(index)
            elif unfinished[item.key] != item.content_hash:
                raise changed_text(item.source, item.line)
        # Planned with those that are done, so that a window that is taken up again has the same packs.
        unique = list(twins)
        batches = []
        for group in passes.plan([len(trajectories[index].input_ids) for index in unique]):
            members = [unique[place] for place in group if twins[unique[place]]]
            if members:
                chosen = [(trajectories[index].input_ids, trajectories[index].labels) for index in members]
                batches.append(passes.prepare(members, chosen))
        yield Window(trajectories, batches, twins, trajectories[0].position, trajectories[-1].position)


class Engine:
    """Scores what a feed brings into a store.

    Args:
        passes: the student, ready.
        cost: its FLOP.
        store: open.
        account: kept up to date after every pass.
        row: the row of a trajectory, from its statistics.
        reject: what to do with a trajectory that the device's memory cannot hold.
        progress: called with how much of the pool is done, before a window and after every pass.
        local_steps: also give local scores with so many preceding steps, see ``local``; the feed finds the steps.
    """

    def __init__(
        self,
        passes: Passes,
        cost: ForwardCost,
        store: ScoreStore,
        account: Account,
        *,
        row: Callable[[Trajectory, Scored], dict[str, Any]],
        reject: Callable[[Trajectory], None],
        progress: Callable[[float], None],
        local_steps: int | None = None,
    ) -> None:
        self.passes, self.cost, self.store, self.account = passes, cost, store, account
        self.row, self.reject, self.progress, self.local_steps = row, reject, progress, local_steps

    def run(self, cut: Iterator[Window], interrupts: Interrupts) -> None:
        """Score every window.

        Raises:
            KeyboardInterrupt: asked to stop; the passes under way have been finished and are in the store.
            UserError: of the feed.
            OSError: of the store.
        """
        on_gpu = self.passes.student.device.type == "cuda"
        with ThreadPoolExecutor(1, "writer") as thread, prefetch(cut, 1 if on_gpu else 0) as ahead:
            writer = _Writer(thread, self.account)
            for window in ahead:
                self.account.waiting_seconds = ahead.waited_seconds
                self.progress(window.start)
                try:
                    with interrupts.held():
                        lost = self._score(window, interrupts, writer)
                except KeyboardInterrupt:
                    writer.wait()  # a write that failed is to be told
                    raise
                for index in sorted(lost):
                    self.reject(window.trajectories[index])
                keys = [item.key for index, item in enumerate(window.trajectories) if index not in lost]
                writer.submit(self.store.close_window, keys)
                self.progress(window.end)
            writer.wait()

    def _score(self, window: Window, interrupts: Interrupts, writer: "_Writer") -> set[int]:
        """Forward passes of a window until somebody asks to stop; returns what the memory could not hold."""
        lost: set[int] = set()
        done, total = 0, sum(batch.n_tokens for batch in window.batches)

        def position() -> float:
            return window.start + done / total * (window.end - window.start)

        def on_piece(lengths: Sequence[int], n_scored: int) -> None:
            self.account.local_tokens += sum(lengths)
            self.account.forward_flop += self.cost.flop(lengths, n_scored)
            self._count_work()
            self.progress(position())

        if self.local_steps is None:
            results = self.passes.run(interrupts.until_asked(window.batches))
        else:
            starts = [item.step_starts for item in window.trajectories]
            local = LocalPasses(self.passes, self.local_steps, starts, on_piece)
            results = local.run(window.batches, interrupts.until_asked)
        for batch, scored in results:
            if scored is None:
                lost.update(twin for index in batch.members for twin in window.twins[index])
            else:
                writer.submit(self._append, window, batch, scored)
                self._count(window, batch, scored)
            done += batch.n_tokens
            self.progress(position())
        return lost

    def _append(self, window: Window, batch: Batch, scored: Sequence[Scored]) -> None:
        self.store.append(
            [
                self.row(window.trajectories[twin], one)
                for index, one in zip(batch.members, scored, strict=True)
                for twin in window.twins[index]
            ]
        )

    def _count(self, window: Window, batch: Batch, scored: Sequence[Scored]) -> None:
        account = self.account
        self._count_work()
        n_scored = [len(one.tokens.nll) for one in scored]
        for index, n_tokens in zip(batch.members, n_scored, strict=True):
            n_twins = len(window.twins[index])
            account.scored += n_twins
            account.input_tokens += n_twins * len(window.trajectories[index].input_ids)
            account.scored_tokens += n_twins * n_tokens
        account.forward_flop += self.cost.flop(batch.lengths, sum(n_scored))

    def _count_work(self) -> None:
        account, work = self.account, self.passes.work
        account.packs, account.padded_tokens = work.batches, work.padded_tokens
        account.device_seconds, account.out_of_memory = work.device_seconds, work.halvings


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
