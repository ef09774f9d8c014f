"""One run at a time may write to a directory."""

import os
import platform
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from lark_fast.errors import UserError

LOCK = ".lock"  # it stays when the run ends: a lock is on a file, and another run may be about to take it


class DirectoryLock:
    """The right to write to a directory; the system takes it back when the process ends, however it ends."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / LOCK
        self._lock = FileLock(self.path, timeout=0, thread_local=False)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another run has it.
            OSError: the directory cannot be written to.
        """
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(
                f"--out {self.directory}: another run{self._holder()} is writing to it; "
                "wait for its end, or give another directory"
            ) from error
        self._write(f"{os.getpid()}\n{platform.node()}\n")

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._lock.is_locked:
            self._write("")
            self._lock.release()

    def _holder(self) -> str:
        """ " (pid 7 on that machine)", or nothing where it is not known."""
        try:
            pid, host = self.path.read_text(encoding="utf-8").split()[:2]
        except (OSError, ValueError):
            return ""
        return f" (pid {pid} on {host})"

    def _write(self, text: str) -> None:
        # Where the file system knows no locks, filelock takes the file's being there for one and writes its own text,
        # which is the same. And the name of the holder is a courtesy that no full disk may stop.
        if not isinstance(self._lock, SoftFileLock):
            with suppress(OSError):
                self.path.write_text(text, encoding="utf-8")


def refuse_taken(directory: str | Path) -> None:
    """Before a student is loaded onto a device that the other run may need.

    Raises:
        UserError: another run is writing to the directory.
    """
    lock = DirectoryLock(Path(directory))
    if lock.path.is_file():
        with suppress(OSError):  # the store will say it
            lock.acquire()
            lock.release()
