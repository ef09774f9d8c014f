"""The directory of a training run while it runs: who it belongs to, its log, and the state it can be resumed from.

    manifest.json        identity of the run; "complete" once the checkpoint is there
    metrics.jsonl        a line a step and a line a held-out loss
    resume-000123/       weights, optimiser and place in metrics.jsonl after 123 steps; only the newest is kept
    checkpoint.tmp/      what the run leaves, until all of it is there

A resume state is written under a temporary name, flushed and renamed, so at any moment the newest one is whole.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lark_fast.errors import UserError
from lark_fast.files import TEMPORARY_SUFFIX, fsync_directory, write_json

MANIFEST, METRICS, CHECKPOINT = "manifest.json", "metrics.jsonl", "checkpoint"


class RunDirectory:
    """One training run's directory.

    Args:
        directory: made when it does not exist.
        identity: everything that decides the numbers. A directory begun with another identity is refused.
        overwrite: throw away the run that is there.

    Raises:
        UserError: another run's directory, or something that is no training directory; as every method does, where the
            disk is full or cannot be written to.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        self.path = Path(directory)
        self.identity = json.loads(json.dumps(identity))
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self.manifest = self._read_manifest()
            self._remove_leftovers()
            if self.manifest is not None and overwrite:
                self._clear()
            if self.manifest is None:
                self.write_manifest(complete=False)
        self._refuse_another_identity()

    @property
    def complete(self) -> bool:
        """The run has ended and its checkpoint is there."""
        return self.manifest["complete"]

    def write_manifest(self, *, complete: bool, **facts: Any) -> None:
        """Write manifest.json; ``facts`` are config, counts, versions, timing, files."""
        self.manifest = {"kind": "training", "complete": complete, "identity": self.identity, **facts}
        with self._writing():
            write_json(self.path / MANIFEST, self.manifest)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        with open(self.path / METRICS, encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl; it survives the end of this process."""
        with self._writing(), open(self.path / METRICS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")

    def save(self, steps: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep what it takes to go on after ``steps`` steps; older states are removed once this one is whole."""
        older = self._states()
        final = self.path / f"resume-{steps:06d}"
        if final in older:
            return
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        moments = {
            f"{number}.{name}": tensor.contiguous()
            for number, state in optimizer.state_dict()["state"].items()
            for name, tensor in state.items()
        }
        with self._writing():
            temporary = self._new_directory(final.name)
            save_file(weights, temporary / "weights.safetensors")
            save_file(moments, temporary / "optimizer.safetensors")
            metrics = self.path / METRICS
            write_json(temporary / "state.json", {"steps": steps, "metrics_bytes": metrics.stat().st_size})
            for file in [metrics, *temporary.iterdir()]:
                _flush(file)
            fsync_directory(temporary)
            os.replace(temporary, final)
            fsync_directory(self.path)
            for state in older:
                _remove(state)

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
            with self._writing():
                metrics.write_bytes(b"")
            return None
        state = json.loads((states[-1] / "state.json").read_text(encoding="utf-8"))
        if not metrics.exists() or metrics.stat().st_size < state["metrics_bytes"]:
            raise UserError(f"{metrics}: lines are missing, the run cannot go on; start anew with --overwrite")
        with self._writing():
            os.truncate(metrics, state["metrics_bytes"])
        weights = load_file(states[-1] / "weights.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        moments: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, tensor in load_file(states[-1] / "optimizer.safetensors").items():
            number, name = key.split(".")
            moments[int(number)][name] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(moments)})
        return state["steps"]

    @contextmanager
    def checkpoint(self) -> Iterator[Path]:
        """Yield an empty directory; on a clean exit the files in it become the run's, and replace files of their names.

        The manifest names them before the first one moves, and config.json, without which nothing loads the others,
        moves last: a run that dies in between leaves nothing that looks complete, and --overwrite finds all of it.
        """
        with self._writing():
            temporary = self._new_directory(CHECKPOINT)
            yield temporary
            files = sorted(temporary.iterdir(), key=lambda file: (file.name == "config.json", file.name))
            self.write_manifest(complete=False, files=[file.name for file in files])
            for file in files:
                _flush(file)
                os.replace(file, self.path / file.name)
            temporary.rmdir()
            fsync_directory(self.path)

    def forget_states(self) -> None:
        """Remove all resume states."""
        for state in self._states():
            _remove(state)

    def _states(self) -> list[Path]:
        """Whole resume states, oldest first."""
        found = [path for path in self.path.glob("resume-*") if path.name.removeprefix("resume-").isdecimal()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("resume-")))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A disk that is full or read-only is the user's to mend: a line, no traceback."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--out {self.path}: cannot be written to: {reason}") from error

    def _new_directory(self, name: str) -> Path:
        """An empty directory under a temporary name."""
        temporary = self.path / (name + TEMPORARY_SUFFIX)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return temporary

    def _remove_leftovers(self) -> None:
        """What a killed process left under temporary names."""
        for name in (MANIFEST, CHECKPOINT, "resume-*"):
            for path in self.path.glob(name + TEMPORARY_SUFFIX):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if any(path.name != MANIFEST + TEMPORARY_SUFFIX for path in self.path.iterdir()):
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
        # A process that is killed in here leaves the old manifest, so that no state of the old run is taken for one of
        # the new; but no longer a complete one, since its files may be gone.
        write_json(self.path / MANIFEST, {**self.manifest, "complete": False})
        self.forget_states()
        for name in [*self.manifest.get("files", []), METRICS]:
            (self.path / Path(name).name).unlink(missing_ok=True)
        self.manifest = None


def _remove(state: Path) -> None:
    """Remove a state; at no moment does half of one bear its name."""
    doomed = state.with_name(state.name + TEMPORARY_SUFFIX)
    os.replace(state, doomed)
    shutil.rmtree(doomed)


def _flush(file: Path) -> None:
    """Make a file's content survive a power cut."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
