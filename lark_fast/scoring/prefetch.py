"""An iterator runs ahead of its consumer, in a thread."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_PATIENCE_SECONDS = 5.0


def prefetch(iterable: Iterable[T], depth: int) -> "Prefetched[T]":
    """Run an iterator in a background thread, up to ``depth`` items ahead; with 0, inline and without a thread.

    The iterator is advanced and closed by that thread alone. What it raises, the consumer sees behind the items that
    came before it.

    Raises:
        ValueError: ``depth`` is below 0.
    """
    if depth < 0:
        raise ValueError(f"depth is at least 0, not {depth}")
    return Prefetched(iter(iterable), depth)


class Prefetched(Iterator[T], Generic[T]):
    """See ``prefetch``. Close it, or use it in a ``with``: the iterator's own ``finally`` then runs at once.

    Attributes:
        waited_seconds: how long the consumer has waited for items; with a depth of 0 the iterator's own time.
    """

    def __init__(self, iterator: Iterator[T], depth: int) -> None:
        self.waited_seconds = 0.0
        if not depth:
            self._source: _Inline[T] | _Ahead[T] = _Inline(iterator)
            return
        self._source = _Ahead(depth)
        # The thread knows the queue but not this object, so that one which is dropped is closed, at exit at the latest.
        thread = threading.Thread(target=self._source.run, args=(iterator,), name="prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._source, thread)
        thread.start()

    def __iter__(self) -> "Prefetched[T]":
        return self

    def __next__(self) -> T:
        started = time.perf_counter()
        try:
            return self._source.get()
        finally:
            self.waited_seconds += time.perf_counter() - started

    def ready(self, seconds: float) -> bool:
        """Wait so long for the next item at most; whether it is there, or the end is, so that ``next`` does not wait.

        Without a thread it is made by ``next`` itself.
        """
        started = time.perf_counter()
        try:
            return self._source.ready(seconds)
        finally:
            self.waited_seconds += time.perf_counter() - started

    def close(self) -> None:
        """Stop and close the iterator, once it has made the item it is at; there are no items after that.

        An iterator that takes more than five seconds for its item is left to the thread, which closes it then.
        """
        if isinstance(self._source, _Inline):
            self._source.close()
        else:
            self._finalizer()

    def __enter__(self) -> "Prefetched[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Inline(Generic[T]):
    """No running ahead."""

    def __init__(self, iterator: Iterator[T]) -> None:
        self._iterator, self._ended = iterator, False

    def get(self) -> T:
        if self._ended:
            raise StopIteration
        try:
            return next(self._iterator)
        except BaseException:
            self._ended = True
            raise

    def ready(self, seconds: float) -> bool:
        return True

    def close(self) -> None:
        self._ended = True
        _close(self._iterator)


class _Ahead(Generic[T]):
    """What the thread and the consumer share: a queue that is never longer than ``depth``."""

    def __init__(self, depth: int) -> None:
        self._items: deque[T] = deque()
        self._depth, self._changed = depth, threading.Condition()
        self._ended, self._error, self._stopping = False, None, False

    def run(self, iterator: Iterator[T]) -> None:
        """The thread: make an item whenever there is room for it."""
        error: BaseException | None = None
        try:
            while self._has_room():
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                with self._changed:
                    self._items.append(item)
                    self._changed.notify_all()
                # Not to be held while the next is made.
                del item
        except BaseException as raised:
            error = raised
        finally:
            try:
                _close(iterator)
            except BaseException as raised:
                error = error or raised
            with self._changed:
                self._ended, self._error = True, error
                self._changed.notify_all()

    def get(self) -> T:
        with self._changed:
            while not (self._items or self._ended or self._stopping):
                self._changed.wait()
            if self._items and not self._stopping:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
        if error is None or self._stopping:
            raise StopIteration
        raise error

    def ready(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._items or self._ended or self._stopping, seconds)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._items.clear()
            self._changed.notify_all()

    def _has_room(self) -> bool:
        with self._changed:
            while len(self._items) >= self._depth and not self._stopping:
                self._changed.wait()
            return not self._stopping


def _stop(ahead: _Ahead, thread: threading.Thread) -> None:
    ahead.stop()
    # It may be the thread itself that comes here: garbage is collected wherever it is noticed.
    if thread is not threading.current_thread():
        thread.join(_PATIENCE_SECONDS)


def _close(iterator: Any) -> None:
    close = getattr(iterator, "close", None)
    if close is not None:
        close()
