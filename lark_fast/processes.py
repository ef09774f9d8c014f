"""Processes of one's own at the other end of a socket.

Such a process is a fresh interpreter. It inherits nothing from its parent but that socket, so threads and GPUs of the
parent do no harm; it ends with the socket, however the parent ends; and there is no lock and no name to be left behind.
(concurrent.futures leaves named semaphores when its parent is killed, and workers unless they watch over it.)
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

_DEAF_TO = (signal.SIGINT, signal.SIGTERM)
_LOST = (EOFError, BrokenPipeError, ConnectionResetError)
# What is imported stays: the collector, going through it again and again, would take a fifth of the time until the
# process is there.
_START = (
    "import gc, json, sys; gc.disable(); descriptor, sys.path[:], module, name = json.loads(sys.argv[1]);"
    "import importlib; serve = getattr(importlib.import_module(module), name); gc.freeze(); gc.enable();"
    "serve(descriptor)"
)


class LostProcessError(Exception):
    """A process is gone.

    Attributes:
        how: what ended it, to follow a noun: "was killed (SIGKILL)".
        killed: by SIGKILL, which is also what a system that is short of memory sends.
    """

    def __init__(self, how: str, killed: bool) -> None:
        super().__init__(how)
        self.how, self.killed = how, killed


class ChildProcess:
    """The parent's side of one such process.

    Args:
        serve: what it runs, with the number of its socket, until the parent is gone; see ``Line``.
        environment: variables that it has beside the parent's.
        descriptors: file descriptors that it inherits under the same numbers.

    Raises:
        OSError: the system has no process left.
    """

    def __init__(
        self, serve: Callable[[int], None], environment: Mapping[str, str], *, descriptors: Sequence[int] = ()
    ) -> None:
        self.connection, theirs = Pipe()
        # Ctrl-C goes to all processes of a terminal, a scheduler's SIGTERM to all of a job. A child starts deaf to
        # them, and stays so: what they mean is the parent's to say, and a child ends with its parent.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF_TO)
        try:
            where = [theirs.fileno(), [str(path) for path in sys.path], serve.__module__, serve.__name__]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(where)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # the parent's stderr: its stdout is not for what a model's own code may print
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno(), *descriptors],
            )
        except OSError:
            self.connection.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def send(self, pickled: bytes) -> None:
        """Send it something. It always listens, so this does not wait for its work."""
        # One that is gone may have said why before: that comes when its messages are read.
        with suppress(*_LOST):
            self.connection.send_bytes(pickled)

    def receive(self) -> object:
        """Wait for its next message.

        Raises:
            LostProcessError: it is gone, and has said no more.
        """
        try:
            return self.connection.recv()
        except _LOST:
            raise self._end() from None

    def kill(self) -> None:
        """End it, whatever it is doing: it holds nothing that could be lost."""
        self.connection.close()
        self._process.kill()

    def wait(self) -> None:
        """Wait for its end."""
        self._process.wait()

    def _end(self) -> LostProcessError:
        self._process.kill()  # for one that lost its socket alone
        code = self._process.wait()
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        return LostProcessError(how, code == -signal.SIGKILL)


class Line:
    """The child's side: what the parent sends comes into a queue at once, and what is told goes out in the background.

    So neither side ever waits for the other to stop sending. The process ends when the parent is gone.
    """

    def __init__(self, descriptor: int) -> None:
        self._connection = Connection(descriptor)
        self.received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        for task in (self._listen, self._tell):
            threading.Thread(target=task, daemon=True).start()

    def tell(self, pickled: bytes) -> None:
        """Send the parent a message, while the next one is in work."""
        self._told.put(pickled)

    def _listen(self) -> None:
        try:
            while True:
                self.received.put(self._connection.recv_bytes())
        finally:
            # The parent is gone; or there is no memory left to hear it with, and it is waiting.
            os._exit(1)

    def _tell(self) -> None:
        try:
            while True:
                self._connection.send_bytes(self._told.get())
        finally:
            os._exit(1)
