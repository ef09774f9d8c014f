"""Scores for those who stream: records are handed over as they are made, and come back as futures, scored in batches.

Tokenising and forward passes run in threads of their own, so that the device does not wait for the one, nor the
caller for either, but where too much is pending.
"""

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from lark_fast.attention import NAME as PACKED
from lark_fast.scoring.pipeline import Pipeline, Raw
from lark_fast.scoring.scorer import Scorer, TrajectoryScore


class ScoringQueue:
    """Scores what is handed over, in batches, while the caller goes on; from any number of threads, or from asyncio.

        with ScoringQueue(scorer) as queue:
            future = queue.submit(record)                # waits where max_pending are pending
            future.result().nll                          # a TrajectoryScore
            for score in queue.map(sample(prompts)):     # in the order handed over
                ...

        async with ScoringQueue(scorer) as queue:
            score = await queue.score(record)
            async for score in queue.amap(stream): ...

    A forward pass begins once ``tokens_per_batch`` of the scorer are at hand, or the oldest trajectory has waited for
    ``max_wait``, or no more can come. Scores are those of ``Scorer.score``: to the bit where a pass holds the same
    trajectories, else to 1e-6 in float32. Trajectories with the same tokens tie exactly where they are pending
    together. g_hat needs all candidates of a problem: ``g_hat(...)`` of their nll and Brier scores once they are there.

    A record that cannot be used fails its own future, with the ValueError of ``Scorer.score``, and a trajectory that
    the device's memory cannot hold its own, with torch.OutOfMemoryError. What ends a pass otherwise fails all that is
    pending, and the queue takes no more. A future that is cancelled before its pass is left out. Done-callbacks run in
    the queue's thread: they must be short, and cannot submit where they would have to wait.

    The model is the queue's while it is open: it is in evaluation mode and attends in packs, and nothing else may use
    it, ``scorer.score`` included. Who trains it opens a queue for each round; that takes no more than two threads.
    A queue does not survive a fork.

    Args:
        scorer: with a tokenizer. One thread renders, some 170,000 tokens/s; who has generated the answers has
            ``input_ids`` and ``labels``, which are taken as they are.
        max_pending: trajectories that may be pending at a time, from being handed over to their score. Beside them, no
            more token ids are held than two windows have (``Scorer.tokens_per_window``).
        max_wait: seconds for which a trajectory may wait for others to share its pass; 0: not at all.

    Raises:
        ValueError: the scorer has no tokenizer, or its model is in use; a limit that is none.
    """

    def __init__(self, scorer: Scorer, *, max_pending: int = 1024, max_wait: float = 0.05) -> None:
        if max_pending < 1 or max_wait < 0:
            raise ValueError(f"max_pending is at least 1 and max_wait at least 0, not {max_pending} and {max_wait}")
        if scorer.renderer is None:
            raise ValueError("this Scorer has no tokenizer: score_tokens takes token ids")
        if scorer.student.model.config._attn_implementation == PACKED:
            raise ValueError("the scorer's model is in use, by another queue or run")
        self.max_pending = max_pending
        self._pipeline = Pipeline(scorer, max_pending, max_wait)
        self._pipeline.start()
        # The threads do not know this object, so that a queue that is dropped is closed, at exit at the latest.
        self._finalizer = weakref.finalize(self, _end, self._pipeline)

    @property
    def pending(self) -> int:
        """Trajectories handed over whose futures are not done."""
        return self.max_pending - self._pipeline.free

    def submit(self, record: Raw) -> Future[TrajectoryScore]:
        """Hand over a record of any pool format; waits where ``max_pending`` are pending.

        Without a ``candidate_id`` it is known by how many were handed over before it.

        Raises:
            RuntimeError: the queue is closed or has failed.
        """
        place = self._pipeline.place()
        if not place.done() and threading.current_thread() in self._pipeline.threads:
            self._pipeline.give_up(place)
            raise RuntimeError("a done-callback cannot wait for a place: it runs in the thread that would make room")
        try:
            place.result()
        except BaseException:
            self._pipeline.give_up(place)
            raise
        return self._pipeline.add(record)

    def map(self, records: Iterable[Raw], *, return_exceptions: bool = False) -> Iterator[TrajectoryScore]:
        """Scores in the order of the records, which are taken as they come and never more than ``max_pending`` ahead.

        A score comes out as soon as it is there and the next record has been taken. Leaving the loop cancels what is
        pending.

        Args:
            records: may be endless, and slow; must not itself wait for scores that are still to come.
            return_exceptions: yield what a record's future raises in its place, instead of raising it.
        """
        pending: deque[Future[TrajectoryScore]] = deque()
        try:
            for record in records:
                pending.append(self.submit(record))
                while pending and (pending[0].done() or len(pending) >= self.max_pending):
                    yield _outcome(pending.popleft(), return_exceptions)
            while pending:
                yield _outcome(pending.popleft(), return_exceptions)
        finally:
            for future in pending:
                future.cancel()

    async def score(self, record: Raw) -> TrajectoryScore:
        """``submit`` for asyncio: waits, for a place and then for the score, without holding up the loop."""
        return await asyncio.wrap_future(await self._hand_over(record))

    async def amap(
        self, records: Iterable[Raw] | AsyncIterable[Raw], *, return_exceptions: bool = False
    ) -> AsyncIterator[TrajectoryScore]:
        """``map`` for asyncio, over a plain or an asynchronous iterable."""
        pending: deque[Future[TrajectoryScore]] = deque()
        try:
            async for record in _asynchronous(records):
                pending.append(await self._hand_over(record))
                while pending and (pending[0].done() or len(pending) >= self.max_pending):
                    yield await _awaited(pending.popleft(), return_exceptions)
            while pending:
                yield await _awaited(pending.popleft(), return_exceptions)
        finally:
            for future in pending:
                future.cancel()

    def close(self, drain: bool = True) -> None:
        """Take no more, and return once the model is as it was.

        Args:
            drain: score what is pending; else it is cancelled, but for the pass under way. Ctrl-C while it drains does
                that too.
        """
        self._pipeline.close(drain)
        try:
            self._pipeline.join()
        except BaseException:
            self._pipeline.close(drain=False)
            raise
        self._finalizer.detach()

    async def aclose(self, drain: bool = True) -> None:
        """``close`` without holding up the loop."""
        await asyncio.to_thread(self.close, drain)

    def __enter__(self) -> "ScoringQueue":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    async def __aenter__(self) -> "ScoringQueue":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.aclose(drain=kind is None)

    async def _hand_over(self, record: Raw) -> Future[TrajectoryScore]:
        place = self._pipeline.place()
        try:
            await asyncio.wrap_future(place)
        except BaseException:
            self._pipeline.give_up(place)
            raise
        return self._pipeline.add(record)


def _end(pipeline: Pipeline) -> None:
    pipeline.stop()
    pipeline.join()


def _outcome(future: Future[TrajectoryScore], return_exceptions: bool) -> Any:
    try:
        return future.result()
    except Exception as error:
        if return_exceptions:
            return error
        raise


async def _awaited(future: Future[TrajectoryScore], return_exceptions: bool) -> Any:
    try:
        return await asyncio.wrap_future(future)
    except Exception as error:
        if return_exceptions:
            return error
        raise


async def _asynchronous(records: Iterable[Raw] | AsyncIterable[Raw]) -> AsyncIterator[Raw]:
    if isinstance(records, AsyncIterable):
        async for record in records:
            yield record
    else:
        for record in records:
            yield record
