"""Chunks of work go to processes of their own and come back in order.

A worker is a fresh interpreter at the other end of a socket. It inherits nothing from its parent but that socket, so
threads and GPUs of the parent do no harm; it ends with the socket, however the parent ends; and there is no lock and
no name to be left behind. (concurrent.futures leaves named semaphores when its parent is killed, and workers unless
they watch over it.)
"""

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from lark_fast.errors import UserError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

_CHUNKS_A_WORKER = 4  # one in work, the others on their way there or back
_BYTES_A_WORKER = 4 << 20
_DEAF_TO = (signal.SIGINT, signal.SIGTERM)
_LOST = (EOFError, BrokenPipeError, ConnectionResetError)
# Tokenizers' own threads would only be in each other's way: there is a process for every core already.
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
_START = (
    "import json, sys; descriptor, sys.path[:] = json.loads(sys.argv[1]);"
    "from lark_fast.scoring.workers import work; work(descriptor)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """What a worker sends in place of a result."""

    reason: str
    trace: str
    at_start: bool = False
    out_of_memory: bool = False


def map_in_workers(
    function: Callable[[Chunk], Result],
    chunks: Iterator[tuple[Chunk, int]],
    workers: int,
    *,
    descriptors: Sequence[int] = (),
) -> Iterator[Result]:
    """Yield ``function(chunk)`` for every chunk, in order, from worker processes.

    A bounded number of chunks and bytes is under way at a time. An error of ``chunks`` itself is raised behind the
    results of what it gave before. The workers are gone when the iterator ends, is closed, or raises.

    Args:
        function: sent to each worker once, pickled.
        chunks: what to send, and how many bytes it is, about.
        workers: how many processes, at least 1.
        descriptors: file descriptors that the workers inherit under the same numbers.

    Raises:
        UserError: a worker was killed or is out of memory, or ``function`` cannot be sent.
        RuntimeError: ``function`` raised; its traceback is in the message.
    """
    try:
        pickled = pickle.dumps(function)
    # Whatever a tokenizer's own code raises when it is pickled.
    except Exception as error:
        raise _cannot_be_sent(error) from error
    team: list[_Worker] = []
    try:
        for _ in range(workers):
            team.append(_Worker())
            team[-1].start(descriptors)
        for worker in team:
            worker.send(pickled)
        yield from _in_turn(team, chunks)
    finally:
        for worker in team:
            worker.kill()
        for worker in team:
            worker.wait()


def _in_turn(team: list["_Worker"], chunks: Iterator[tuple[Any, int]]) -> Iterator[Any]:
    """Deal the chunks out in turn and collect the results in the same order."""
    under_way: deque[tuple[_Worker, int]] = deque()
    bytes_under_way, sent, stopped = 0, 0, None
    while True:
        try:
            chunk, size = next(chunks)
        except StopIteration:
            break
        except Exception as error:
            stopped = error
            break
        while under_way and (
            len(under_way) >= _CHUNKS_A_WORKER * len(team) or bytes_under_way + size > _BYTES_A_WORKER * len(team)
        ):
            worker, done = under_way.popleft()
            bytes_under_way -= done
            yield worker.receive()
        worker = team[sent % len(team)]
        worker.send(pickle.dumps(chunk))
        under_way.append((worker, size))
        bytes_under_way, sent = bytes_under_way + size, sent + 1
    while under_way:
        yield under_way.popleft()[0].receive()
    if stopped is not None:
        raise stopped


class _Worker:
    """The parent's side of one worker."""

    def __init__(self) -> None:
        self._connection, self._theirs = Pipe()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, descriptors: Sequence[int]) -> None:
        """Start the process; UserError when the system has none left."""
        theirs = self._theirs.fileno()
        # Ctrl-C goes to all processes of a terminal, a scheduler's SIGTERM to all of a job. A worker starts deaf to
        # them, and stays so: what they mean is the parent's to say, and a worker ends with its parent.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF_TO)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps([theirs, [str(path) for path in sys.path]])],
                stdin=subprocess.DEVNULL,
                stdout=2,  # the parent's stderr: its stdout is not for what a tokenizer's own code may print
                env={**os.environ, **_ENVIRONMENT},
                pass_fds=[theirs, *descriptors],
            )
        except OSError as error:
            raise UserError(f"no worker process can be started ({error}); use fewer --workers") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._theirs.close()

    def send(self, pickled: bytes) -> None:
        """Send the function or a chunk. The worker always listens, so this does not wait for its work."""
        # A worker that is gone may have said why before: that comes when its results are read.
        with suppress(*_LOST):
            self._connection.send_bytes(pickled)

    def receive(self) -> Any:
        """Wait for the next result."""
        try:
            result = self._connection.recv()
        except _LOST:
            raise self._died() from None
        if not isinstance(result, _Failure):
            return result
        if result.out_of_memory:
            raise UserError("a worker process ran out of memory; use fewer --workers")
        if result.at_start:
            raise _cannot_be_sent(result.reason)
        raise RuntimeError(f"in a worker process:\n{result.trace}")

    def kill(self) -> None:
        """End the worker, whatever it is doing: it holds nothing that could be lost."""
        self._connection.close()
        self._theirs.close()
        if self._process is not None:
            self._process.kill()

    def wait(self) -> None:
        """Wait for its end."""
        if self._process is not None:
            self._process.wait()

    def _died(self) -> UserError:
        self._process.kill()  # for one that lost its socket alone
        code = self._process.wait()
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        memory = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return UserError(f"a worker process {how}{memory}; use fewer --workers, or --workers 0 for none")


def _cannot_be_sent(reason: Any) -> UserError:
    return UserError(f"the tokenizer cannot be sent to worker processes ({reason}); use --workers 0")


def work(descriptor: int) -> None:
    """Be a worker: take the function, then chunks, and send results, until the parent is gone."""
    connection = Connection(descriptor)
    chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    results: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, chunks), daemon=True).start()
    threading.Thread(target=_tell, args=(connection, results), daemon=True).start()
    function = None
    while True:
        received = chunks.get()
        try:
            if function is None:
                function = pickle.loads(received)
                continue
            result = pickle.dumps(function(pickle.loads(received)))
        # An interpreter's panic is no Exception; whatever it is, the parent is to say it.
        except BaseException as error:
            result = pickle.dumps(
                _Failure(
                    reason=f"{type(error).__name__}: {error}",
                    trace=traceback.format_exc(),
                    at_start=function is None,
                    out_of_memory=isinstance(error, MemoryError),
                )
            )
        results.put(result)


def _listen(connection: Connection, chunks: "queue.SimpleQueue[bytes]") -> None:
    """Take in what the parent sends at once, so that neither side ever waits for the other to stop sending."""
    try:
        while True:
            chunks.put(connection.recv_bytes())
    finally:
        # The parent is gone; or there is no memory left to hear it with, and it is waiting.
        os._exit(1)


def _tell(connection: Connection, results: "queue.SimpleQueue[bytes]") -> None:
    """Send results while the next chunk is in work."""
    try:
        while True:
            connection.send_bytes(results.get())
    finally:
        os._exit(1)
