"""The directory of a training run while it runs: who it belongs to, its log, and the state it can be resumed from.

    manifest.json        identity of the run; "complete" once the checkpoint is there
    metrics.jsonl        a line a step
    resume-000123/       weights, optimiser and place in metrics.jsonl after 123 steps; only the newest is kept

A resume state is written under a temporary name, flushed and renamed, so at any moment the newest one is whole.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lark_fast.errors import UserError
from lark_fast.files import TEMPORARY_SUFFIX, fsync_directory, write_json

MANIFEST, METRICS = "manifest.json", "metrics.jsonl"


class RunDirectory:
    """One training run's directory.

    Args:
        directory: made when it does not exist.
        identity: everything that decides the numbers. A directory begun with another identity is refused.
        overwrite: throw away the run that is there.

    Raises:
        UserError: another run's directory, or something that is no training directory.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        self.path = Path(directory)
        self.identity = json.loads(json.dumps(identity))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self.manifest = self._read_manifest()
            if self.manifest is not None and overwrite:
                self._clear()
                self.manifest = None
            if self.manifest is None:
                self.write_manifest(complete=False)
        except OSError as error:
            raise UserError(f"--out {directory}: cannot be written to: {error.strerror}") from error
        self._refuse_another_identity()

    @property
    def complete(self) -> bool:
        """The run has ended and its checkpoint is there."""
        return self.manifest["complete"]

    def write_manifest(self, *, complete: bool, **facts: Any) -> None:
        """Write manifest.json; ``facts`` are config, counts, versions, timing, files."""
        self.manifest = {"kind": "training", "complete": complete, "identity": self.identity, **facts}
        write_json(self.path / MANIFEST, self.manifest)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        with open(self.path / METRICS, encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl; it survives the end of this process."""
        with open(self.path / METRICS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")

    def save(self, steps: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep what it takes to go on after ``steps`` steps; older states are removed once this one is whole."""
        older = self._states()
        final = self.path / f"resume-{steps:06d}"
        if final in older:
            return
        temporary = final.with_name(final.name + TEMPORARY_SUFFIX)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(
            {name: p.detach().contiguous() for name, p in model.named_parameters()}, temporary / "weights.safetensors"
        )
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        write_json(temporary / "state.json", {"steps": steps, "metrics_bytes": (self.path / METRICS).stat().st_size})
        for file in [self.path / METRICS, *temporary.iterdir()]:
            flush(file)
        fsync_directory(temporary)
        os.replace(temporary, final)
        fsync_directory(self.path)
        for state in older:
            shutil.rmtree(state)

    def resume(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
        """Load the newest state into model and optimiser, cut metrics.jsonl back to it.

        Returns:
            The steps that are done, or None where there is no state: metrics.jsonl is empty then.

        Raises:
            UserError: metrics.jsonl has lost lines.
        """
        metrics = self.path / METRICS
        states = self._states()
        if not states:
            metrics.write_bytes(b"")
            return None
        state = json.loads((states[-1] / "state.json").read_text(encoding="utf-8"))
        if not metrics.exists() or metrics.stat().st_size < state["metrics_bytes"]:
            raise UserError(f"{metrics}: lines are missing, the run cannot go on; start anew with --overwrite")
        os.truncate(metrics, state["metrics_bytes"])
        weights = load_file(states[-1] / "weights.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        optimizer.load_state_dict(torch.load(states[-1] / "optimizer.pt", map_location="cpu", weights_only=True))
        return state["steps"]

    def forget_states(self) -> None:
        """Remove all resume states."""
        for state in self._states():
            shutil.rmtree(state)

    def _states(self) -> list[Path]:
        """Whole resume states, oldest first."""
        found = [path for path in self.path.glob("resume-*") if path.name.removeprefix("resume-").isdecimal()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("resume-")))

    def _remove_leftovers(self) -> None:
        """What a killed process left under temporary names."""
        for path in self.path.glob("*" + TEMPORARY_SUFFIX):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if any(self.path.iterdir()):
                raise UserError(f"--out {self.path}: holds other files; give an empty or a new directory") from None
            return None
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict) or manifest.get("kind") != "training":
            raise UserError(f"--out {self.path}: its {MANIFEST} is not a training run's; give another directory")
        return manifest

    def _refuse_another_identity(self) -> None:
        stored = self.manifest["identity"]
        differing = [name for name in {**stored, **self.identity} if stored.get(name) != self.identity.get(name)]
        if differing:
            changes = "; ".join(
                f"{name} was {stored.get(name)!r}, is {self.identity.get(name)!r}" for name in differing
            )
            raise UserError(
                f"--out {self.path}: holds a run that was begun otherwise ({changes}); "
                "give another directory, or --overwrite to throw it away"
            )

    def _clear(self) -> None:
        self.forget_states()
        for name in [*self.manifest.get("files", []), METRICS, MANIFEST]:
            (self.path / Path(name).name).unlink(missing_ok=True)


def flush(file: Path) -> None:
    """Make a file's content survive a power cut."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def move_into(files: Sequence[Path], directory: Path) -> list[str]:
    """Flush files and rename them into ``directory``; returns their names."""
    for file in files:
        flush(file)
        os.replace(file, directory / file.name)
    fsync_directory(directory)
    return [file.name for file in files]
