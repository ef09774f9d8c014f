"""The directory of a training run while it runs: who it belongs to, its log, and the state it can be resumed from.

    manifest.json        identity of the run; "complete" once the checkpoint is there
    metrics.jsonl        a line a step and a line a held-out loss
    resume-000123/       weights, optimiser and place in metrics.jsonl after 123 steps; only the newest is kept
    best-000100/         weights of the best held-out loss, where the run is to stop by it
    checkpoint.tmp/      what the run leaves, until all of it is there

Of several ranks each writes and reads its own part of the tensors (``weights-0-of-2.safetensors``), and rank 0 all
else. A state may be read by another number of ranks.

A resume state is written under a temporary name, flushed and renamed, so at any moment the newest one is whole.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lark_fast.errors import UserError
from lark_fast.files import TEMPORARY_SUFFIX, atomic_path, fsync_directory, write_json
from lark_fast.lock import LOCK, DirectoryLock
from lark_fast.world import ALONE, World

MANIFEST, METRICS, CHECKPOINT = "manifest.json", "metrics.jsonl", "checkpoint"
PROBE = "probe-before.safetensors"
TRACKED = ("tensorboard", "wandb")  # directories of trackers
CONFIGS = ("config.json", "adapter_config.json")


def steps_from(student: Mapping[str, str], checkpoint: str | Path) -> int | None:
    """How many steps a checkpoint is away from the student that its run began with.

    Args:
        student: the fingerprint of that student.
        checkpoint: directory.

    Returns:
        None where the directory does not say so: no finished run's, or one that began elsewhere.
    """
    try:
        manifest = json.loads((Path(checkpoint) / MANIFEST).read_text(encoding="utf-8"))
        ours = manifest["kind"] == "training" and manifest["complete"]
        begun_with = manifest["identity"]["student"]
        if not ours or any(begun_with.get(part) != student.get(part) for part in ("weights", "adapter")):
            return None
        best = manifest["best_step"]
        return (manifest["counts"]["steps"] if best is None else best) or None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not there, or some other program's
        return None


class RunDirectory:
    """One training run's directory.

    Args:
        directory: made when it does not exist.
        identity: everything that decides the numbers. A directory begun with another identity is refused.
        overwrite: throw away the run that is there.
        world: the ranks of the run; rank 0 makes the directory.

    Raises:
        UserError: another run's directory, or something that is no training directory; as every method does, where the
            disk is full or cannot be written to.
    """

    def __init__(
        self, directory: str | Path, identity: dict[str, Any], *, overwrite: bool = False, world: World = ALONE
    ) -> None:
        self.path, self.world = Path(directory), world
        self.identity = json.loads(json.dumps(identity))
        self._lock = DirectoryLock(self.path)
        if world.main:
            with self._writing():
                self.path.mkdir(parents=True, exist_ok=True)
                found = self._read_manifest()  # whose directory is it?
                if overwrite or found is None or not found["complete"]:  # what is complete is only read
                    self._lock.acquire()
                self.manifest = self._read_manifest()
                self._remove_leftovers()
                if self.manifest is not None and overwrite:
                    self._clear()
                if self.manifest is None:
                    self.write_manifest(complete=False)
        world.wait()
        self.manifest = self._read_manifest()
        try:
            self._refuse_another_identity()
        except UserError:
            self._lock.release()
            raise

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        """Let another run have the directory; what is complete needs no lock, and goes wherever its owner sends it."""
        self._lock.release()
        if self.world.main and self.complete:
            self._lock.path.unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        """The run has ended and its checkpoint is there."""
        return self.manifest["complete"]

    @property
    def steps_kept(self) -> int:
        """Steps after which a stopped run is to go on; 0 where it begins anew."""
        states = self._states("resume")
        return _steps(states[-1]) if states else 0

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

    def save(self, steps: int, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Keep what it takes to go on after ``steps`` steps; older states are removed once this one is whole."""
        if self._name("resume", steps) in self._states("resume"):
            return
        states = _optimizer_states(optimizer)
        moments = {f"{n}.{k}": v for n, state in states.items() for k, v in state.items() if isinstance(v, Tensor)}
        # bitsandbytes counts its steps in a plain number.
        counts = {str(n): state["step"] for n, state in states.items() if isinstance(state["step"], int)}
        facts = {"steps": steps, "metrics_bytes": 0, "moved": list(states), "counts": counts}
        if self.world.main:
            facts["metrics_bytes"] = (self.path / METRICS).stat().st_size
            with self._writing():
                _flush(self.path / METRICS)
        self._save("resume", steps, {"weights": trained, "optimizer": moments}, facts, self._states("resume"))

    def save_best(self, steps: int, trained: Mapping[str, Tensor]) -> None:
        """Keep the weights after ``steps`` steps in place of the best so far.

        The best at the time of the last resume state stays too: a run that goes on from there needs it.
        """
        older = self._states("best")
        known = [state for state in older if _steps(state) <= self.steps_kept]
        self._save("best", steps, {"weights": trained}, {"steps": steps}, [s for s in older if s not in known[-1:]])

    def load_best(self, trained: Mapping[str, Tensor]) -> int:
        """Load the best weights; the steps they were best after."""
        best = self._states("best")[-1]
        _load(best, "weights", trained, self.world)
        return json.loads((best / "state.json").read_text(encoding="utf-8"))["steps"]

    def resume(self, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int | None:
        """Load the newest state into what is trained and the optimiser, cut metrics.jsonl back to it.

        Returns:
            The steps that are done, or None where there is no state: metrics.jsonl is empty then.

        Raises:
            UserError: metrics.jsonl has lost lines.
        """
        metrics, states = self.path / METRICS, self._states("resume")
        later = [best for best in self._states("best") if not states or _steps(best) > _steps(states[-1])]
        self.world.wait()  # until all have looked
        if self.world.main:
            with self._writing():
                for best in later:
                    _remove(best)
        if not states:
            if self.world.main:
                with self._writing():
                    metrics.write_bytes(b"")
            self.world.wait()
            return None
        state = json.loads((states[-1] / "state.json").read_text(encoding="utf-8"))
        if not metrics.exists() or metrics.stat().st_size < state["metrics_bytes"]:
            raise UserError(f"{metrics}: lines are missing, the run cannot go on; start anew with --overwrite")
        self.world.wait()
        if self.world.main:
            with self._writing():
                os.truncate(metrics, state["metrics_bytes"])
        _load_moments(states[-1], optimizer, state, self.world)
        _load(states[-1], "weights", trained, self.world)
        self.world.wait()
        return state["steps"]

    @contextmanager
    def checkpoint(self) -> Iterator[Path]:
        """Yield an empty directory; on a clean exit the files in it become the run's, and replace files of their names.

        Of several ranks all take part, and rank 0 alone gets a directory.

        The manifest names them before the first one moves, and the config, without which nothing loads the others,
        moves last: a run that dies in between leaves nothing that looks complete, and --overwrite finds all of it.
        """
        with self._writing():
            temporary = self._new_directory(CHECKPOINT) if self.world.main else self.path
            yield temporary
            if not self.world.main:
                return
            files = sorted(temporary.iterdir(), key=lambda file: (file.name in CONFIGS, file.name))
            self.write_manifest(complete=False, files=[file.name for file in files])
            for file in files:
                _flush(file)
                os.replace(file, self.path / file.name)
            temporary.rmdir()
            fsync_directory(self.path)

    def forget_states(self) -> None:
        """Remove all resume states, and what the run kept beside them."""
        for state in [*self._states("resume"), *self._states("best")]:
            _remove(state)
        (self.path / PROBE).unlink(missing_ok=True)

    def keep_probe(self, nll: Tensor) -> None:
        """Keep the probe's nll from before training."""
        with self._writing(), atomic_path(self.path / PROBE) as temporary:
            save_file({"nll": nll}, temporary)

    def probe(self) -> Tensor | None:
        """What ``keep_probe`` kept."""
        return load_file(self.path / PROBE)["nll"] if (self.path / PROBE).exists() else None

    def _name(self, kind: str, steps: int) -> Path:
        return self.path / f"{kind}-{steps:06d}"

    def _states(self, kind: str) -> list[Path]:
        """Whole states, oldest first."""
        found = [path for path in self.path.glob(f"{kind}-*") if path.name.removeprefix(f"{kind}-").isdecimal()]
        return sorted(found, key=_steps)

    def _save(
        self,
        kind: str,
        steps: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        facts: dict[str, Any],
        replaced: Sequence[Path],
    ) -> None:
        """Write a state, every rank its own part of the tensors; those that it replaces go once it is whole."""
        final = self._name(kind, steps)
        temporary = final.with_name(final.name + TEMPORARY_SUFFIX)
        with self._writing():
            if self.world.main:
                self._new_directory(final.name)
            self.world.wait()
            for part, tensors in parts.items():
                file = temporary / f"{part}{_of_rank(self.world.rank, self.world.size)}.safetensors"
                save_file(_apart(tensors), file)
                _flush(file)
            self.world.wait()
            if self.world.main:
                write_json(temporary / "state.json", facts | {"ranks": self.world.size})
                fsync_directory(temporary)
                os.replace(temporary, final)
                fsync_directory(self.path)
                for state in replaced:
                    _remove(state)
            self.world.wait()

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
        for name in (MANIFEST, CHECKPOINT, PROBE, "resume-*", "best-*"):
            for path in self.path.glob(name + TEMPORARY_SUFFIX):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if any(path.name not in (LOCK, MANIFEST + TEMPORARY_SUFFIX) for path in self.path.iterdir()):
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
        for name in TRACKED:
            shutil.rmtree(self.path / name, ignore_errors=True)
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


def _steps(state: Path) -> int:
    """After how many steps a state was kept."""
    return int(state.name.rpartition("-")[2])


def _of_rank(rank: int, size: int) -> str:
    return "" if size == 1 else f"-{rank}-of-{size}"


def _local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts, as safetensors takes them: contiguous, and none in the memory of another."""
    taken: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        own = _local(tensor).detach().contiguous()
        apart[name] = own.clone() if own.data_ptr() in taken else own  # bitsandbytes' tables are shared
        taken.add(own.data_ptr())
    return apart


def _optimizer_states(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """What the optimiser keeps of each parameter that has moved, by the parameter's number."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {n: optimizer.state[parameter] for n, parameter in enumerate(parameters) if parameter in optimizer.state}


def _load_moments(path: Path, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World) -> None:
    """An optimiser makes its moments in its first step: let it, with a rate of 0, then fill them in."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number in state["moved"]:
        parameters[number].grad = torch.zeros_like(parameters[number], dtype=parameters[number].grad_dtype)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    made = _optimizer_states(optimizer)
    moments = {f"{n}.{k}": v for n, one in made.items() for k, v in one.items() if isinstance(v, Tensor)}
    _load(path, "optimizer", moments, world)
    for number, count in state["counts"].items():
        made[int(number)]["step"] = count


@torch.no_grad()
def _load(state: Path, part: str, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fill tensors, or this rank's parts of them, from a state that any number of ranks has written."""
    ranks = json.loads((state / "state.json").read_text(encoding="utf-8"))["ranks"]
    same = ranks == world.size
    read = [world.rank] if same else range(ranks)
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(state / f"{part}{_of_rank(rank, ranks)}.safetensors", "pt")) for rank in read
        ]
        for name, tensor in tensors.items():
            pieces = [file.get_tensor(name) for file in files]
            if same or pieces[0].ndim == 0:
                _local(tensor).copy_(pieces[0])
                continue
            # Parts follow one another along the first axis; of one process there is one.
            whole = torch.cat(pieces)
            if isinstance(tensor, DTensor):
                first = sum(len(piece) for piece in whole.chunk(world.size)[: world.rank])
                whole = whole[first : first + len(_local(tensor))]
            _local(tensor).copy_(whole)
