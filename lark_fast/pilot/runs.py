"""One run of a pilot: a short training run of so many tokens, and what it did to the held-out loss."""

import gc
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lark_fast.errors import DivergedError
from lark_fast.pilot.config import PilotConfig
from lark_fast.pilot.selections import Selection
from lark_fast.pilot.split import HELD_OUT, MEASURED
from lark_fast.rendering.renderer import Renderer
from lark_fast.training.batches import global_batch, steps_per_epoch
from lark_fast.training.config import TrainConfig
from lark_fast.training.data import load_training_set
from lark_fast.training.run import train

FOLDER = "runs"
_DIGITS = 6
_SAVE_EVERY = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of one: a line of runs.jsonl.

    Attributes:
        contender, seed: whose.
        rows: of its selection.
        steps, tokens, epochs: trained; tokens are input tokens.
        training: [tokens, loss] of each step on its batch; the tokens are those before it.
        held_out: [tokens, mean nll of the measured trajectories], the first before training.
        nll_before, nll_after: of every held-out trajectory, in the order of held-out.jsonl; () where it diverged.
        own: loss of what the policy selects of the held-out problems, before and after; None for a bucket.
        teachers: shares of the weight trained on.
        diverged: why it ended early, else None.
    """

    contender: str
    seed: int
    rows: int
    steps: int
    tokens: int
    epochs: float
    tokens_per_second: float
    training: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    nll_before: tuple[float, ...] = ()
    nll_after: tuple[float, ...] = ()
    own: tuple[float, float] | None = None
    teachers: Mapping[str, float]
    diverged: str | None = None

    def as_json(self) -> dict[str, Any]:
        """A line of runs.jsonl."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Run":
        """The run of a line.

        Raises:
            TypeError, KeyError: it is none.
        """
        pairs = {name: tuple(map(tuple, entry[name])) for name in ("training", "held_out")}
        own = None if entry["own"] is None else tuple(entry["own"])
        nll = {name: tuple(entry[name]) for name in ("nll_before", "nll_after")}
        return cls(**{**entry, **pairs, **nll, "own": own})


def lengths_in(selection: Selection, renderer: Renderer) -> NDArray[np.int64]:
    """``[N]`` the tokens of a selection's trajectories."""
    return load_training_set(str(selection.path), renderer, quiet=True).lengths


def steps_for(lengths: NDArray[np.int64], tokens: int, batch_size: int, seed: int) -> int:
    """How many steps come nearest to so many input tokens; at least one. ``lengths``: as ``lengths_in``."""
    total = steps = 0
    while True:
        more = int(lengths[global_batch(steps, len(lengths), batch_size, seed)].sum())
        if steps and total + more / 2 > tokens:
            return steps
        total, steps = total + more, steps + 1


def carry_out(
    config: PilotConfig, contender: str, seed: int, selection: Selection, lengths: NDArray[np.int64], tokens: int
) -> Run:
    """Train, going on where a stopped run was, and measure.

    Raises:
        UserError: it cannot be trained.
    """
    batch, folder = config.global_batch, folder_of(config, contender, seed)
    steps = steps_for(lengths, tokens, batch, seed)
    diverged, speed = None, 0.0
    try:
        speed = train(_training(config, seed, selection, folder, steps, len(lengths))).tokens_per_second
    except DivergedError as error:
        diverged = error.what
    gc.collect()  # a trainer is in a circle of references, and must not wait there with its student for the next one
    training, held_out, tokens_done = [], [], 0
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        logged = json.loads(line)
        if "loss" in logged:
            training.append((tokens_done, round(logged["loss"], _DIGITS)))
            tokens_done += logged["tokens"]
        else:
            held_out.append((tokens_done, round(logged["eval_loss"], _DIGITS)))
    before, after, own = (), (), None
    if diverged is None:
        before, after, own = _held_out(folder, selection)
    return Run(
        contender=contender,
        seed=seed,
        rows=len(lengths),
        steps=len(training),
        tokens=tokens_done,
        epochs=round(len(training) * batch / len(lengths), 3),
        tokens_per_second=round(speed, 1),
        training=tuple(training),
        held_out=tuple(held_out),
        nll_before=before,
        nll_after=after,
        own=own,
        teachers={name: round(share, 4) for name, share in selection.teachers.items()},
        diverged=diverged,
    )


def _training(config: PilotConfig, seed: int, selection: Selection, folder: Path, steps: int, rows: int) -> TrainConfig:
    """What ``lark-fast train`` is asked to do for one run."""
    return TrainConfig(
        data=str(selection.path),
        student=config.student,
        base=config.base,
        out=str(folder),
        eval_data=str(Path(config.out, MEASURED)),
        eval_every=-(-steps // config.evaluations),
        probe=str(Path(config.out, HELD_OUT)),
        epochs=-(-steps // steps_per_epoch(rows, config.global_batch)),
        max_steps=steps,
        lr=config.lr,
        global_batch=config.global_batch,
        tokens_per_batch=config.tokens_per_batch,
        dtype=config.dtype,
        lora=config.lora,
        device=config.device,
        seed=seed,
        save_every=_SAVE_EVERY,
        gradient_checkpointing=config.gradient_checkpointing,
        options=config.options,
        chat_template=config.chat_template,
        overwrite=config.overwrite,
        trust_remote_code=config.trust_remote_code,
    )


def folder_of(config: PilotConfig, contender: str, seed: int) -> Path:
    """Where the run trains."""
    return Path(config.out, FOLDER, f"{contender}-{seed}".replace("/", "_").replace(":", "."))


def remove(folder: Path) -> None:
    """A directory that is no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)


def _held_out(folder: Path, selection: Selection) -> tuple[tuple[float, ...], tuple[float, ...], Any]:
    """nll of the held-out trajectories before and after, and the two losses of what the policy selects of them."""
    probe = pq.read_table(folder / "probe.parquet")
    before, after = (probe.column(name).to_numpy() for name in ("nll_before", "nll_after"))
    own = None
    if selection.held_out is not None:
        keys = zip(probe.column("problem_id").to_pylist(), probe.column("candidate_id").to_pylist(), strict=True)
        weights = [selection.held_out.get(key, 0.0) for key in keys]
        losses = tuple(sum(w * x for w, x in zip(weights, nll.tolist(), strict=True)) for nll in (before, after))
        if min(losses) > 0:
            own = tuple(loss / sum(weights) for loss in losses)
    rounded = [tuple(round(value, _DIGITS) for value in nll.tolist()) for nll in (before, after)]
    return rounded[0], rounded[1], own
