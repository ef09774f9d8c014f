"""Files that appear whole or not at all: written to a temporary name, flushed to disk, renamed."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lark_fast.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


def refuse_overlap(out: str | os.PathLike[str], inputs: Mapping[str, Iterable[Path]]) -> None:
    """What a run reads, by the option that names it, may not lie in the directory it writes, nor hold it.

    Raises:
        UserError: it does.
    """
    resolved = Path(out).resolve()
    for option, paths in inputs.items():
        for path in paths:
            if path.resolve().is_relative_to(resolved):
                raise UserError(f"--out {out}: holds {option} {path}; give another directory")
            # A student is loaded by the names of its files; a pool's directory is searched.
            if option != "--student" and resolved.is_relative_to(path.resolve()):
                raise UserError(f"--out {out}: lies in {option} {path}; give another directory")


@contextmanager
def writing_to(out: str | os.PathLike[str]) -> Iterator[None]:
    """A disk that is full or cannot be written to is the user's to mend."""
    try:
        yield
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise UserError(f"--out {out}: cannot be written to: {error.strerror or error}{file}") from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on a clean exit its content becomes ``path``, else it is removed."""
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open ``path`` for writing (mode "w", UTF-8, or "wb") so that readers see all of it or none."""
    with atomic_path(path) as temporary, open(temporary, mode, encoding=None if "b" in mode else "utf-8") as stream:
        yield stream


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_open(path) as stream:
        json.dump(value, stream, ensure_ascii=False, indent=2, allow_nan=False)
        stream.write("\n")


def without_nan(value: Any) -> Any:
    """What JSON can hold: None for numbers that are not finite, lists for tuples."""
    if isinstance(value, dict):
        return {name: without_nan(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make renames inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
