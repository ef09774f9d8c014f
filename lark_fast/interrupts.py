"""Ctrl-C and SIGTERM, which is how a scheduler ends a job, stop a run where nothing is lost by it."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class Interrupts:
    """Inside ``with Interrupts() as interrupts`` both signals raise KeyboardInterrupt; inside ``held`` they wait.

    Only the first waits: who presses Ctrl-C twice means it, and gets the exception at once. A signal that somebody else
    handles or ignores (nohup) stays theirs, and outside the main thread Python allows no handlers: there nothing
    changes.
    """

    def __init__(self) -> None:
        self._held = self._waiting = False
        self._replaced: list[tuple[int, object]] = []

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                    self._replaced.append((number, signal.signal(number, self._receive)))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._replaced:
            signal.signal(number, handler)

    @property
    def waiting(self) -> bool:
        """A signal waits for the end of ``held``."""
        return self._waiting

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the first signal wait until the end of the block; of blocks in blocks, of the outermost."""
        if self._held:
            yield
            return
        self._held = True
        try:
            yield
        finally:
            self._held = False
            waiting, self._waiting = self._waiting, False  # it is answered now: it must not count as the first again
        if waiting:
            raise KeyboardInterrupt

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Inside ``held``, where there is nothing to lose for a while: a signal counts at once."""
        if self._waiting:
            raise KeyboardInterrupt
        held, self._held = self._held, False
        try:
            yield
        finally:
            self._held = held

    def until_asked(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until a signal waits; for loops inside ``held``."""
        for item in items:
            if self._waiting:
                return
            yield item

    def _receive(self, *_: int | FrameType | None) -> None:
        if not self._held or self._waiting:
            raise KeyboardInterrupt
        self._waiting = True
