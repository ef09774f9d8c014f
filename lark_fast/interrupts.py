"""Ctrl-C and SIGTERM, which is how a scheduler ends a job, stop a run where nothing is lost by it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Inside ``with Interrupts() as interrupts`` both signals raise KeyboardInterrupt, but not inside ``held``.

    A signal that somebody else handles or ignores (nohup) stays theirs, and outside the main thread Python allows no
    handlers: there nothing changes.
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

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let signals wait until the end of the block."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting:
            raise KeyboardInterrupt

    def _receive(self, *_: int | FrameType | None) -> None:
        if not self._held:
            raise KeyboardInterrupt
        self._waiting = True
