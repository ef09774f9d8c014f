"""Pool paths, as a user writes them, become the list of files to read."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lark_fast.errors import UserError

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json")
POOL_SUFFIXES = (".parquet", *(text + packed for text in _TEXT_SUFFIXES for packed in ("", ".gz", ".zst")))
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_pool_files(paths: Sequence[str]) -> tuple[Path, ...]:
    """Return the files behind ``paths``, in their order and sorted within each, every file once.

    A path is a file (read whatever it is called), a directory (searched for POOL_SUFFIXES, hidden names skipped),
    a glob ("**" for any depth; it finds files with POOL_SUFFIXES) or the id of a Hugging Face dataset.
    Raises UserError for a path behind which there is nothing to read.
    """
    if not paths:
        raise UserError("no pool was given")
    files: dict[tuple[int, int], Path] = {}
    for path in paths:
        for found in sorted(_expand(os.fspath(path))):
            try:
                found.encode()
                status = os.stat(found)
            except UnicodeEncodeError:
                raise UserError(f"pool file {found!r}: the name is not UTF-8; rename the file") from None
            except OSError as error:
                raise cannot_read(found, error) from None
            files.setdefault((status.st_dev, status.st_ino), Path(found))
    return tuple(files.values())


def cannot_read(path: str | Path, error: OSError) -> UserError:
    """Return the error to raise when the operating system refuses a pool file or directory."""
    return UserError(f"pool {str(path)!r} cannot be read: {error.strerror or error}")


def _expand(path: str) -> list[str]:
    if os.path.isdir(path):
        found = list(_search_directory(path))
        nothing = f"pool directory {path!r} holds no file named *{', *'.join(POOL_SUFFIXES)}"
    elif os.path.isfile(path):
        return [path]
    elif os.path.exists(path):
        raise UserError(
            f"pool {path!r} is not a regular file; pools are read more than once, so write it to a file first"
        )
    elif glob.has_magic(path):
        found = [file for file in _search_glob(path) if _is_pool_name(file)]
        nothing = (
            f"pool pattern {path!r} matches no file named *{', *'.join(POOL_SUFFIXES)}; quote it against the shell"
        )
    elif _DATASET_ID.fullmatch(path) and not _is_pool_name(path):
        snapshot = _download_dataset(path)
        found = list(_search_directory(snapshot))
        nothing = f"the Hugging Face dataset {path!r} holds no file named *{', *'.join(POOL_SUFFIXES)}"
    else:
        raise UserError(
            f"pool {path!r} does not exist; give a file, a directory, a quoted glob or a dataset id (org/name)"
        )
    if not found:
        raise UserError(nothing)
    return found


def _search_directory(top: str) -> Iterator[str]:
    """Yield the pool files below ``top``; links to directories are followed, each directory once."""

    def refuse(error: OSError) -> None:
        raise cannot_read(error.filename or top, error)

    visited = set()
    for directory, subdirectories, names in os.walk(top, onerror=refuse, followlinks=True):
        real = os.path.realpath(directory)
        if real in visited:
            subdirectories.clear()
            continue
        visited.add(real)
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        for name in names:
            path = os.path.join(directory, name)
            if not name.startswith(".") and _is_pool_name(name) and os.path.isfile(path):
                yield path


def _search_glob(pattern: str) -> Iterator[str]:
    for path in glob.iglob(pattern, recursive=True):
        if os.path.isdir(path):
            yield from _search_directory(path)
        elif os.path.isfile(path):
            yield path


def _is_pool_name(path: str) -> bool:
    return path.lower().endswith(POOL_SUFFIXES)


def _download_dataset(dataset: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            dataset, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in POOL_SUFFIXES]
        )
    # What an unreachable or refusing hub raises depends on the HTTP library behind it; all of it means the same here.
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"pool {dataset!r} does not exist, and it could not be fetched as a Hugging Face dataset: {reason}"
        ) from error
