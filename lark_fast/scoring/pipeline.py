"""The two threads of a ``ScoringQueue``, and what they share with who hands records over.

waiting -> rendering (a thread) -> ready -> forward passes (a thread) -> futures
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lark_fast.batch import Batch
from lark_fast.errors import RejectError
from lark_fast.pool.records import Record, normalise
from lark_fast.scoring.feed import token_hash
from lark_fast.scoring.forward import Scored
from lark_fast.scoring.scorer import Scorer, TrajectoryScore, named_score, trajectory_stats

Raw = dict[str, Any] | Record


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What was handed over."""

    record: Raw
    ordinal: int
    future: Future[TrajectoryScore]
    since: float  # on the monotonic clock


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A trajectory that waits for its pass."""

    entry: Entry
    record: Record
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    truncated: bool
    digest: bytes


class Pipeline:
    """Entries, from being handed over to their score.

    An entry takes one of ``max_pending`` places. The thread that has it settles it, once, and gives its place to the
    first who waits for one. No future is touched under the lock in a way that calls back.

    Args:
        scorer: with a renderer; its model is made ready for passes here, and left as it was by the passing thread.
        max_pending: places.
        max_wait: seconds, see ``ScoringQueue``.

    Attributes:
        free: places that nobody has.
        threads: rendering, passing.
    """

    def __init__(self, scorer: Scorer, max_pending: int, max_wait: float) -> None:
        self.free, self._max_wait, self._scorer = max_pending, max_wait, scorer
        self._most_ready = scorer.tokens_per_window
        # It may be entered again by its own thread: garbage, and so a queue's end, is noticed anywhere.
        self._changed = threading.Condition(threading.RLock())
        self._wanted: deque[Future[None]] = deque()  # places, by those who wait for one
        self._waiting: deque[Entry] = deque()
        self._rendering = False
        self._ready: list[Ready] = []
        self._ready_tokens = 0
        self._under_way: dict[int, list[Ready]] = {}  # those with the same tokens, by a number; of the passing thread
        self._numbers, self._ordinals = itertools.count(), itertools.count()
        self._closed = self._stopped = False  # no more comes in; nothing more is begun
        self._error: BaseException | None = None
        self._running = 0  # threads
        self._model = ExitStack()
        self._passes = self._model.enter_context(scorer.passes())
        # Daemons: at exit they are told to end, and Python would wait for others before that.
        self.threads = [
            threading.Thread(target=self._run, args=(self._render_all,), name="lark-fast rendering", daemon=True),
            threading.Thread(target=self._run, args=(self._pass_all,), name="lark-fast passes", daemon=True),
        ]

    def start(self) -> None:
        """Start the threads.

        Raises:
            RuntimeError: there can be no more threads; the model is left as it was.
        """
        try:
            for thread in self.threads:
                thread.start()
                with self._changed:
                    self._running += 1
        except RuntimeError:
            self.stop()
            self._model.close()
            raise

    def place(self) -> Future[None]:
        """Room for one entry: done at once where there is, else in turn.

        Raises:
            RuntimeError: closed, as all who wait for a place are told then.
        """
        place: Future[None] = Future()
        with self._changed:
            self._refuse_closed()
            if self.free == 0:
                self._wanted.append(place)
                return place
            self.free -= 1
        place.set_result(None)
        return place

    def give_up(self, place: Future[None]) -> None:
        """The place is not needed after all, whether it has been granted or not."""
        if not place.cancel() and place.exception() is None:
            self._give_back()

    def add(self, record: Raw) -> Future[TrajectoryScore]:
        """Put a record on a place that was granted.

        Raises:
            RuntimeError: closed.
        """
        future: Future[TrajectoryScore] = Future()
        with self._changed:
            if not self._closed:
                self._waiting.append(Entry(record, next(self._ordinals), future, time.monotonic()))
                self._changed.notify_all()
                return future
        self._give_back()
        raise self._refusal()

    def close(self, drain: bool) -> None:
        """Let no more in; end when all is scored, or without ``drain`` as soon as the pass under way is."""
        with self._changed:
            self._closed, self._stopped = True, self._stopped or not drain
            wanted, self._wanted = self._wanted, deque()
            self._changed.notify_all()
        for place in wanted:
            if place.set_running_or_notify_cancel():
                place.set_exception(self._refusal())

    def stop(self) -> None:
        """``close`` without draining, where nobody can wait for a place."""
        with self._changed:
            self._closed = self._stopped = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the threads' end; one of themselves does not."""
        if threading.current_thread() in self.threads:
            return
        with self._changed:  # an interrupted Thread.join would take the thread for ended ever after
            while self._running:
                self._changed.wait()
        for thread in self.threads:
            thread.join()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise self._refusal()

    def _refusal(self) -> RuntimeError:
        if self._error is None:
            return RuntimeError("the queue is closed")
        refusal = RuntimeError(f"the queue has failed: {type(self._error).__name__}: {self._error}")
        refusal.__cause__ = self._error
        return refusal

    # Of both threads.

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._error = self._error or error
            self.close(drain=False)
        finally:
            if work == self._pass_all:
                self._settle_left()
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _start(self, entry: Entry) -> bool:
        """Whether it is still wanted; if so it can no longer be cancelled, and else its place is free."""
        if entry.future.set_running_or_notify_cancel():
            return True
        self._give_back()
        return False

    def _settle(self, entry: Entry, outcome: TrajectoryScore | BaseException) -> None:
        """Tell an entry that was started."""
        if isinstance(outcome, BaseException):
            entry.future.set_exception(outcome)
        else:
            entry.future.set_result(outcome)
        self._give_back()

    def _drop(self, entry: Entry) -> None:
        """An entry that was not started, and will not be."""
        if self._error is None:
            entry.future.cancel()
        if self._start(entry):
            self._settle(entry, self._error)

    def _give_back(self) -> None:
        place = None
        with self._changed:
            while self._wanted and place is None:
                first = self._wanted.popleft()
                place = first if first.set_running_or_notify_cancel() else None
            self.free += place is None
        if place is not None:
            place.set_result(None)

    # Of the rendering thread.

    def _render_all(self) -> None:
        while (entry := self._next_waiting()) is not None:
            ready = self._rendered(entry)
            with self._changed:
                self._rendering, stopped = False, self._stopped
                if ready is not None and not stopped:
                    self._ready.append(ready)
                    self._ready_tokens += len(ready.input_ids)
                self._changed.notify_all()
            if ready is not None and stopped:
                self._drop(entry)

    def _next_waiting(self) -> Entry | None:
        with self._changed:
            while not self._stopped:
                if self._waiting and self._ready_tokens < self._most_ready:
                    self._rendering = True
                    return self._waiting.popleft()
                if self._closed and not self._waiting:
                    return None
                self._changed.wait()
        return None

    def _rendered(self, entry: Entry) -> Ready | None:
        """None where the entry is settled: it was cancelled, or cannot be used."""
        if entry.future.cancelled():
            self._start(entry)
            return None
        try:
            raw = entry.record
            record = raw if isinstance(raw, Record) else normalise(raw, ordinal=entry.ordinal)
            rendered = self._scorer.renderer(record)
            ids, labels = (np.array(numbers, dtype=np.int32) for numbers in (rendered.input_ids, rendered.labels))
            return Ready(entry, record, ids, labels, rendered.truncated, token_hash(ids, labels))
        except BaseException as error:  # a tokenizer's or template's own exceptions too: they are this record's alone
            if self._start(entry):
                named = ValueError(f"record {entry.ordinal}: {error}")
                named.__cause__ = error
                self._settle(entry, named if isinstance(error, RejectError) else error)
            return None

    # Of the passing thread.

    def _pass_all(self) -> None:
        with self._model, _on(self._scorer.student.device):
            for batch, scored in self._passes.run(self._batches()):
                self._hand_out(batch, scored)

    def _wait_until_due(self) -> bool:
        """False where nothing will be."""
        with self._changed:
            while not self._stopped and not self._is_due():
                if self._closed and not (self._waiting or self._rendering or self._ready):
                    return False
                self._changed.wait(self._patience() if self._ready else None)
            return not self._stopped

    def _is_due(self) -> bool:
        if not self._ready:
            return False
        more = self._waiting or self._rendering or (self.free and not self._closed)
        return not more or self._ready_tokens >= self._passes.layout.tokens_per_batch or self._patience() <= 0

    def _patience(self) -> float:
        return self._ready[0].entry.since + self._max_wait - time.monotonic()

    def _take_due(self) -> list[Ready]:
        with self._changed:
            if self._stopped or not self._is_due():
                return []
            taken, self._ready, self._ready_tokens = self._ready, [], 0
            self._changed.notify_all()
        return taken

    def _batches(self) -> Iterator[Batch | None]:
        """Batches of what is due; None before a wait, for which results under way need not wait too."""
        while True:
            if taken := self._take_due():
                yield from self._laid_out(taken)
            else:
                yield None
                if not self._wait_until_due():
                    return

    def _laid_out(self, taken: Sequence[Ready]) -> Iterator[Batch]:
        twins: dict[bytes, list[Ready]] = {}
        for ready in taken:
            twins.setdefault(ready.digest, []).append(ready)
        numbers = [next(self._numbers) for _ in twins]
        self._under_way.update(zip(numbers, twins.values(), strict=True))
        for group in self._passes.layout.plan([len(ready[0].input_ids) for ready in twins.values()]):
            if self._stopped:
                return
            members = [number for number in (numbers[place] for place in group) if self._start_twins(number)]
            if members:
                first = [self._under_way[number][0] for number in members]
                asked = [(ready.input_ids, self._scorer.asked(ready.labels, ready.digest)) for ready in first]
                yield self._passes.layout.prepare(members, asked)

    def _start_twins(self, number: int) -> bool:
        started = [ready for ready in self._under_way.pop(number) if self._start(ready.entry)]
        if started:
            self._under_way[number] = started
        return bool(started)

    def _hand_out(self, batch: Batch, scored: Sequence[Scored] | None) -> None:
        for place, number in enumerate(batch.members):
            for ready in self._under_way[number]:
                n_tokens = len(ready.input_ids)
                if scored is None:
                    outcome = torch.OutOfMemoryError(f"no memory for a sequence of {n_tokens} tokens")
                else:
                    stats = trajectory_stats(scored[place], n_tokens, ready.truncated, ready.digest)
                    outcome = named_score(ready.record, stats)
                self._settle(ready.entry, outcome)
            del self._under_way[number]

    def _settle_left(self) -> None:
        """Behind the last pass: nothing is left where all was drained."""
        with self._changed:
            left = [ready.entry for twins in self._under_way.values() for ready in twins]
            left += [*(ready.entry for ready in self._ready), *self._waiting]
            self._under_way, self._ready, self._waiting = {}, [], deque()
        for entry in left:
            if entry.future.running():
                self._settle(entry, self._error)
            elif entry.future.cancelled() or not entry.future.done():
                self._drop(entry)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    # A thread begins on the first GPU, whichever the caller is on.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
