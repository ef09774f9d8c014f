"""A directory in which a run keeps a line of JSON for each piece of work, as soon as that is done.

DIR/<lines>         the lines, in the order in which they were done
DIR/manifest.json   what decides them, and what else there is to say of the run
DIR/.lock           held by the run that writes here
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lark_fast.errors import UserError
from lark_fast.files import TEMPORARY_SUFFIX, fsync_directory, write_json, writing_to
from lark_fast.lock import LOCK, DirectoryLock

MANIFEST = "manifest.json"


class LineStore:
    """Such a directory, open for writing inside a ``with`` block.

    Args:
        directory: where it is; made when it does not exist.
        identity: everything that decides the lines. A directory begun with another is refused.
        lines: name of the file.
        results: names of what the run writes when all lines are there; whatever else is found is a stranger's.
        folders: names of directories that the run and what it calls write to; ``overwrite`` leaves them alone.
        overwrite: throw away what a run left there.

    Raises:
        UserError: the directory is another run's or holds something else; another run writes to it.

    Attributes:
        facts: what an earlier run has noted.
    """

    def __init__(
        self,
        directory: str,
        identity: Mapping[str, Any],
        *,
        lines: str,
        results: Collection[str] = (),
        folders: Collection[str] = (),
        overwrite: bool = False,
    ) -> None:
        self.directory, self.identity, self.facts = Path(directory), dict(identity), dict[str, Any]()
        self._path, self._lock = self.directory / lines, DirectoryLock(self.directory)
        self._ours = {lines, MANIFEST, *results}
        with writing_to(directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._refuse_strangers({LOCK, *self._ours, *folders})
            self._lock.acquire()
            try:
                self._open(overwrite)
            except BaseException:
                self._lock.release()
                raise

    def __enter__(self) -> "LineStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()

    def take(self, entry: dict[str, Any]) -> None:
        """Take in a line that an earlier run has written.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """

    def keep(self, entry: Mapping[str, Any]) -> None:
        """Write a line; after this returns it survives anything.

        Raises:
            OSError: the disk is full or cannot be written to.
        """
        # Half of a surrogate pair, which a byte-level tokenizer can leave, is an escape in JSON.
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def note(self, **facts: Any) -> None:
        """Write the manifest."""
        self.facts = facts
        write_json(self.directory / MANIFEST, {"identity": self.identity, **facts})

    def _refuse_strangers(self, known: Collection[str]) -> None:
        names = (path.name for path in self.directory.iterdir())
        strangers = sorted(name for name in names if name.removesuffix(TEMPORARY_SUFFIX) not in known)
        if strangers:
            raise UserError(f"--out {self.directory}: holds something else ({strangers[0]}); give another directory")

    def _open(self, overwrite: bool) -> None:
        manifest = self.directory / MANIFEST
        if overwrite:
            for name in self._ours:
                (self.directory / name).unlink(missing_ok=True)
        if manifest.exists():
            self._refuse_another(manifest)
        elif self._path.exists():
            raise UserError(
                f"--out {self.directory}: has {self._path.name} but no {MANIFEST}; --overwrite throws it away"
            )
        else:
            self.note()
        whole = sum(map(len, self._whole_lines())) if self._path.exists() else 0
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - open until the block ends
        self._file.truncate(whole)
        fsync_directory(self.directory)

    def _refuse_another(self, manifest: Path) -> None:
        try:
            self.facts = json.loads(manifest.read_text(encoding="utf-8"))
            there = self.facts.pop("identity")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{manifest}: cannot be read ({error}); --overwrite begins anew") from error
        asked = json.loads(json.dumps(self.identity))
        differing = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
        if differing:
            told = ", ".join(f"{name} {there.get(name)!r} there, {asked.get(name)!r} now" for name in differing[:3])
            raise UserError(
                f"--out {self.directory}: was begun otherwise ({told}); give another directory or --overwrite"
            )

    def _whole_lines(self) -> Iterator[bytes]:
        """What is there, taken in; what follows the last whole line was never finished."""
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    self.take(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{self._path}:{number}: cannot be read ({error}); remove the line, and it is done again"
                    ) from error
                yield line
