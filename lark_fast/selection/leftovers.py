"""What lies in --out already: refused, or removed where a new selection would contradict it."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from lark_fast.errors import UserError
from lark_fast.selection.config import SelectConfig
from lark_fast.selection.exporters import FORMATS, files_of
from lark_fast.selection.weighing import Weighed


def refuse_existing(config: SelectConfig, directories: Iterable[Path]) -> None:
    """UserError where a file is that a run without --overwrite would write or remove."""
    for directory in directories:
        if any((directory / name).exists() for name in ("train.jsonl", "weights.parquet")):
            raise UserError(f"--out {directory}: holds a selection already; give another directory or --overwrite")
        for path in (*_common_files(config), *_files(directory)):
            if path.exists():
                raise UserError(f"--out {config.out}: holds {path} already; give another directory or --overwrite")


def _files(directory: Path) -> list[Path]:
    """All that a selection may have in its directory."""
    own = [directory / name for name in ("train.jsonl", "weights.parquet", "manifest.json")]
    return own + [path for name in FORMATS for path in files_of(name, directory)]


def _common_files(config: SelectConfig) -> list[Path]:
    """What the selections of a run share."""
    return [Path(config.out, name) for name in ("removed.jsonl", "comparison.json", "comparison.md")]


def remove_leftovers(config: SelectConfig, selections: Mapping[Path, Weighed]) -> None:
    """Remove what earlier selections left and these do not write again; old manifests speak of other files."""
    earlier = {Path(config.out, name) for name in _swept_names(Path(config.out, "comparison.json"))}
    stale = [path for directory in {Path(config.out), *earlier} - selections.keys() for path in _files(directory)]
    stale += [path for path in _common_files(config) if not (config.filters and path.name == "removed.jsonl")]
    for directory, weighed in selections.items():
        written = {directory / "weights.parquet"} | ({directory / "train.jsonl"} if config.pool else set())
        if len(weighed.rows):
            written |= {path for name in config.export for path in files_of(name, directory)}
        stale += [path for path in _files(directory) if path not in written]
    for path in stale:
        path.unlink(missing_ok=True)
    emptied = {path.parent for path in stale} - {Path(config.out), *selections}
    for directory in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # not empty, or never there
            directory.rmdir()


def _swept_names(path: Path) -> list[str]:
    """The selections that an earlier sweep left, by the comparison that it wrote."""
    try:
        names = list(json.loads(path.read_text(encoding="utf-8"))["selections"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if Path(name).name == name]
