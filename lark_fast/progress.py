"""Progress of long work: a live bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Says how far a piece of work has come, how fast it goes and how long it will take."""

    def __init__(self, description: str, total: float, *, every_seconds: float = 10.0) -> None:
        self.description, self.total, self.every_seconds = description, total, every_seconds
        self.started = self.last_line = time.monotonic()
        self.done, self.detail = 0.0, ""
        self._bar = self._task = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            ]
            self._bar = Bar(*columns, console=Console(stderr=True), transient=False)
            self._bar.start()
            self._task = self._bar.add_task(description, total=total or None, detail="")

    def update(self, done: float, detail: str = "") -> None:
        """Set the work done so far (in units of ``total``) and a short figure such as a rate."""
        self.done, self.detail = done, detail
        if self._bar is not None:
            self._bar.update(self._task, completed=done, detail=detail)
        elif time.monotonic() - self.last_line >= self.every_seconds:
            self._print_line()

    def close(self) -> None:
        """End the display; a log gets its last line."""
        if self._bar is not None:
            self._bar.stop()
        elif self.done:
            self._print_line()

    def _print_line(self) -> None:
        self.last_line = time.monotonic()
        elapsed = self.last_line - self.started
        share = min(self.done / self.total, 1.0) if self.total else 0.0
        left = f", {elapsed * (1 - share) / share:.0f} s left" if 0 < share < 1 else ""
        detail = f", {self.detail}" if self.detail else ""
        print(f"{self.description}: {share:.0%}{detail}, {elapsed:.0f} s{left}", file=sys.stderr, flush=True)


@contextmanager
def track(description: str, total: float) -> Iterator[Progress]:
    """Show progress for the duration of the block."""
    progress = Progress(description, total)
    try:
        yield progress
    finally:
        progress.close()
