"""The records of a pool that are still to be scored, as token ids, read and rendered ahead in worker processes.

The main process reads the pool and sends raw records out in chunks; workers parse, render and tokenise; the main
process takes what comes back in the pool's order and decides what it means. So the outcome is the same with any number
of workers, none included.
"""

import hashlib
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lark_fast.errors import RejectError, UserError
from lark_fast.pool.faults import duplicate
from lark_fast.pool.keys import KeySnapshot, KeyTable
from lark_fast.pool.reading import Pool, RawRecord, Rejected
from lark_fast.rendering.renderer import Renderer, TemplateError
from lark_fast.scoring.local import step_starts
from lark_fast.scoring.workers import map_in_workers

_CHUNK_BYTES = 1 << 18
_CHUNK_RECORDS = 512
_MOST_WORKERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A record ready for the student, small to send from process to process."""

    key: tuple[str, str]  # problem and candidate
    teacher: str  # "" when unknown
    source: str
    line: int
    ordinal: int  # in the whole pool, see ``Record``
    content_hash: bytes  # 16 bytes, see ``Record.content_hash``
    input_ids: NDArray[np.int32]  # [T]
    labels: NDArray[np.int32]  # [T], NOT_SCORED where not scored, elsewhere equal to input_ids
    truncated: bool
    token_hash: bytes  # 16 bytes, see ``token_hash``
    position: int  # how many bytes of the pool had been read when this record was; never falls
    step_starts: NDArray[np.int32] | None = None  # [S], see ``local.step_starts``; None where nobody asked


@dataclass(frozen=True, slots=True, kw_only=True)
class _NotRendered:
    """A record that was read but has no tokens: because it is known as it is, or because it cannot be rendered."""

    key: tuple[str, str]
    source: str
    line: int
    content_hash: bytes
    fault: str | None = None  # None: it is known
    is_template: bool = False  # the template is at fault, not the record


_Prepared = Trajectory | _NotRendered | Rejected


class _Chunk(NamedTuple):
    """What became of some raw records."""

    items: list[_Prepared]
    seconds: float  # that it took
    position: int  # of the last one, as in ``Trajectory``


def token_hash(input_ids: Sequence[int] | NDArray, labels: Sequence[int] | NDArray) -> bytes:
    """16 bytes that are equal for equal token ids and scored positions.

    Args:
        input_ids: ``[T]``, any integers.
        labels: ``[T]``, NOT_SCORED where not scored.
    """
    # Stores keep this hash: it is of 64-bit integers, whatever they come in.
    digest = hashlib.blake2b(np.asarray(input_ids, dtype=np.int64).tobytes(), digest_size=16)
    digest.update(np.asarray(labels, dtype=np.int64).tobytes())
    return digest.digest()


def changed_text(source: str, line: int) -> UserError:
    """The error to raise for a record that was scored with another text."""
    return UserError(
        f"{source}:{line}: this record's text is not the one that was scored; "
        "give a changed pool a directory of its own, or --overwrite"
    )


def default_workers(device_type: str, devices: int = 1, beside: int | None = None) -> int:
    """How many workers to use when nobody says: none beside a CPU's forward pass, which needs every core itself.

    ``beside``: how many of the devices are of this machine and take a core of it; None: all.
    """
    if device_type == "cpu":
        return 0
    return max(1, min(_MOST_WORKERS * devices, _usable_cores() - 1 - (devices if beside is None else beside)))


def _usable_cores() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Feed:
    """The trajectories of a pool that are still to be scored, in the pool's order; one pass over it.

    Whatever cannot be used goes to ``on_reject`` on the way, in the same order; what that raises ends the pass. A
    second record with a key of this pass is a reject. The worker processes are gone when the iteration has ended, by
    itself, by an error or by closing it.

    Attributes:
        records: read from the pool so far, rejects and known ones too.
        kept: known from before.
        yielded, truncated, input_tokens: of the trajectories yielded.
        position: bytes of the pool behind all that is done with, which moves on where nothing is yielded too.
        render_seconds: time spent on parsing, rendering and tokenising, the sum over the workers.
    """

    def __init__(
        self,
        pool: Pool,
        renderer: Renderer,
        *,
        known: KeyTable,
        on_reject: Callable[[str, int, str], None],
        limit: int | None = None,
        workers: int = 0,
        resumed: bool | None = None,
        find_steps: bool = False,
    ) -> None:
        """Nothing is read or started before the iteration.

        Args:
            pool: what to read.
            renderer: makes tokens; with workers, it has to survive pickling.
            known: what is scored already, not met; all that is yielded is added to it, met, and known records that are
                in the pool get marked.
            on_reject: called with source, line and reason.
            limit: read at most so many records.
            workers: processes to use; with 0 there is neither a process nor a thread.
            resumed: whether scores exist already, so that a template at fault costs only the records it concerns. None:
                if anything is known.
            find_steps: also say where each trajectory's steps begin.

        Raises:
            ValueError: ``workers`` is below 0.
        """
        if workers < 0:
            raise ValueError(f"workers is at least 0, not {workers}")
        self._pool, self._renderer, self._known, self._on_reject = pool, renderer, known, on_reject
        self._limit, self._workers, self._find_steps = limit, workers, find_steps
        self._resumed = len(known) > 0 if resumed is None else resumed
        self.records = self.kept = self.yielded = self.truncated = self.input_tokens = self.position = 0
        self.render_seconds = 0.0

    def __iter__(self) -> Iterator[Trajectory]:
        """Yield trajectories.

        Raises:
            UserError: a file has gone or cannot be read; a known record has another text now; the template is at fault
                and nothing is scored yet; a worker died. Everything that was yielded before stands.
        """
        with closing(self._in_workers() if self._workers else self._inline()) as chunks:
            for chunk in chunks:
                self.render_seconds += chunk.seconds
                for item in chunk.items:
                    if self._is_new(item):
                        yield item
                self.position = chunk.position

    def _inline(self) -> Iterator[_Chunk]:
        prepare = _Preparer(self._renderer, self._known, self._find_steps)
        with closing(self._pool.read_raw(self._limit)) as raws:
            for raw in raws:
                yield prepare([raw])

    def _in_workers(self) -> Iterator[_Chunk]:
        keys = self._snapshot()
        prepare = _Preparer(self._renderer, keys, self._find_steps)
        descriptors = [keys.descriptor] if keys else []
        try:
            with closing(self._chunks()) as chunks:
                yield from map_in_workers(prepare.unpickle, chunks, self._workers, descriptors=descriptors)
        finally:
            if keys:
                keys.close()

    def _snapshot(self) -> KeySnapshot | None:
        # Only what was known from the start matters: a record's second coming is rare, and found out when it is back.
        if not len(self._known):
            return None
        try:
            return self._known.snapshot()
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: no room for what the workers have to know ({error.strerror or error}); "
                "set TMPDIR to another directory, or use --workers 0"
            ) from error

    def _chunks(self) -> Iterator[tuple[list[bytes], int]]:
        """Pickled raw records, a few at a time, and their size; an error of the pool comes behind what precedes it."""
        chunk: list[bytes] = []
        size = 0
        try:
            with closing(self._pool.read_raw(self._limit)) as raws:
                for raw in raws:
                    chunk.append(pickle.dumps(raw))
                    size += len(chunk[-1])
                    if size >= _CHUNK_BYTES or len(chunk) == _CHUNK_RECORDS:
                        yield chunk, size
                        chunk, size = [], 0
        except Exception:
            if chunk:
                yield chunk, size
            raise
        if chunk:
            yield chunk, size

    def _is_new(self, item: _Prepared) -> bool:
        """Count a record; True for a trajectory to be scored, all else is dealt with here."""
        self.records += 1
        if isinstance(item, Rejected):
            self._on_reject(item.source, item.line, item.reason)
            return False
        entry = self._known.find(item.key)
        # A reject may have the key of a record that was scored: it was none then, and is none now.
        if isinstance(item, _NotRendered) and item.fault is not None and (entry is None or not entry.met):
            self._reject_fault(item)
            return False
        if entry is None:
            self._known.add(item.key, item.content_hash, met=True)
            self.yielded += 1
            self.truncated += item.truncated
            self.input_tokens += len(item.input_ids)
            return True
        if entry.met:
            self._on_reject(item.source, item.line, duplicate(item.key))
        elif entry.content != KeyTable.short_content(item.content_hash):
            # A stored score must not stand for a text that is no longer there.
            raise changed_text(item.source, item.line)
        else:
            self._known.mark(item.key)
            self.kept += 1
        return False

    def _reject_fault(self, item: _NotRendered) -> None:
        assert item.fault is not None
        # Where the template is at fault others will follow: say so before hours are spent. A run that has got somewhere
        # goes on instead, since another rendering could not share its directory.
        if item.is_template and not self._resumed and not self.yielded:
            raise UserError(f"{item.source}:{item.line}: {item.fault}")
        self._on_reject(item.source, item.line, item.fault)


class _Preparer:
    """What happens to raw records in a worker, or without one."""

    def __init__(self, renderer: Renderer, known: KeyTable | KeySnapshot | None, find_steps: bool) -> None:
        self._renderer, self._known, self._find_steps = renderer, known, find_steps

    def __call__(self, raws: Iterable[RawRecord]) -> _Chunk:
        """Parse, render and tokenise them."""
        started, items, position = time.perf_counter(), [], 0
        for raw in raws:
            items.append(self._prepared(raw))
            position = raw.position
        return _Chunk(items, time.perf_counter() - started, position)

    def unpickle(self, chunk: Sequence[bytes]) -> _Chunk:
        """The same for raw records as they are sent to workers."""
        return self(map(pickle.loads, chunk))

    def _prepared(self, raw: RawRecord) -> _Prepared:
        record = raw.parse()
        if isinstance(record, Rejected):
            return record
        key, content_hash = record.key, record.content_hash()
        known, fault, is_template = self._known is not None and self._known.holds(key, content_hash), None, False
        if not known:
            try:
                rendered = self._renderer(record)
            except RejectError as error:
                fault, is_template = str(error), isinstance(error, TemplateError)
        if known or fault is not None:
            return _NotRendered(
                key=key,
                source=record.source,
                line=record.line,
                content_hash=content_hash,
                fault=fault,
                is_template=is_template,
            )
        input_ids, labels = (np.array(numbers, dtype=np.int32) for numbers in (rendered.input_ids, rendered.labels))
        return Trajectory(
            key=key,
            teacher=record.teacher,
            source=record.source,
            line=record.line,
            ordinal=record.ordinal,
            content_hash=content_hash,
            input_ids=input_ids,
            labels=labels,
            truncated=rendered.truncated,
            token_hash=token_hash(input_ids, labels),
            position=raw.position,
            step_starts=step_starts(rendered, self._renderer) if self._find_steps else None,
        )
