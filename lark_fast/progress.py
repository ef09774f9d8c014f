"""Progress of long work: a live bar on a terminal, a plain line now and then in a log."""

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


def duration(seconds: float) -> str:
    """A time as people read it: "165 s", "12 min 05 s", "2 h 05 min", "3 d 04 h"; "?" where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 180:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    if hours == 0:
        return f"{minutes} min {whole % 60:02d} s"
    if hours < 24:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


class Progress:
    """Says how far a piece of work has come, how fast it goes and how long it will take."""

    def __init__(self, description: str, total: float, *, every_seconds: float = 10.0) -> None:
        self.description, self.total, self.every_seconds = description, total, every_seconds
        self.started = self.last_line = self._paced_since = time.monotonic()
        self.done, self.detail, self._paced_from = 0.0, "", 0.0
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

    def pace_from(self, done: float) -> None:
        """What was done up to here, an earlier run had done: it was passed over, and its pace foretells nothing."""
        self._paced_from, self._paced_since = done, time.monotonic()
        self.update(done, self.detail)

    @property
    def seconds_left(self) -> float:
        """What the rest takes at the pace so far; NaN before the first step and where ``total`` is 0."""
        paced = self.done - self._paced_from
        if not self.total or paced <= 0:
            return math.nan
        return (time.monotonic() - self._paced_since) * max(self.total - self.done, 0.0) / paced

    def close(self) -> None:
        """End the display; a log gets its last line."""
        if self._bar is not None:
            self._bar.stop()
        elif self.done:
            self._print_line()

    def _print_line(self) -> None:
        self.last_line = time.monotonic()
        share = min(self.done / self.total, 1.0) if self.total else 0.0
        left = self.seconds_left
        parts = [f"{share:.0%}", self.detail, duration(self.last_line - self.started)]
        parts.append(f"{duration(left)} left" if left > 0 else "")
        print(f"{self.description}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)


@contextmanager
def track(description: str, total: float) -> Iterator[Progress]:
    """Show progress for the duration of the block."""
    progress = Progress(description, total)
    try:
        yield progress
    finally:
        progress.close()


class Throughput:
    """What the live line of forward passes says, over the last half minute or so: totals are the summary's.

    Args:
        ceiling: FLOP/s of the machine's best matrix product; NaN leaves the share of it out.
        window_seconds: how far back a rate looks.
    """

    def __init__(self, ceiling: float = math.nan, window_seconds: float = 30.0) -> None:
        self.ceiling, self.window_seconds = ceiling, window_seconds
        self._seen = deque([(time.monotonic(), 0.0, 0.0)])  # (time, tokens, FLOP) since the start

    def detail(self, tokens: float, flop: float, rejected: int = 0) -> str:
        """For ``Progress.update``: "7,312 tokens/s, 71% of the matmul ceiling, 3 rejected".

        Args:
            tokens: of all forward passes so far.
            flop: theirs, see ``lark_fast.flop``.
            rejected: records so far.
        """
        now = time.monotonic()
        # As far back as the window reaches: the newest of those that are older than it, so that there always is one.
        while len(self._seen) > 1 and now - self._seen[1][0] >= self.window_seconds:
            self._seen.popleft()
        then, tokens_then, flop_then = self._seen[0]
        seconds = max(now - then, 1e-9)
        # A point a second at most: an update may come a thousand times as often.
        if now - self._seen[-1][0] >= min(1.0, self.window_seconds / 30):
            self._seen.append((now, tokens, flop))
        share = (flop - flop_then) / seconds / self.ceiling if self.ceiling else math.nan
        parts = [f"{(tokens - tokens_then) / seconds:,.0f} tokens/s"]
        if math.isfinite(share):
            parts.append(f"{share:.0%} of the matmul ceiling")
        if rejected:
            parts.append(f"{rejected:,} rejected")
        return ", ".join(parts)
