"""All steps of a run that are not done yet: measured, guarded, taken, logged, and kept so that nothing is lost."""

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lark_fast.errors import DivergedError, UserError
from lark_fast.flop import ForwardCost
from lark_fast.interrupts import Interrupts
from lark_fast.progress import Throughput, track
from lark_fast.training.data import TrainingSet
from lark_fast.training.guards import Guard
from lark_fast.training.state import RunDirectory
from lark_fast.training.step import Measured, Trainer
from lark_fast.training.trackers import Trackers

TIMED = ("tokens_per_s", "ceiling_share", "memory_bytes")  # fields of a line that differ when a run is repeated


@dataclass(slots=True)
class Timing:
    """Of the steps of this call."""

    resumed_from: int | None
    tokens: int = 0
    seconds: float = 0.0
    flop: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Input tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Loop:
    """Drives a trainer from where its directory says it is.

    Args:
        trainer: the student, its data and its config.
        held_out: trajectories whose loss is measured now and then, or None.
        directory: of the run.
        trackers: what else is told every line of the log.
        ceiling: FLOP/s of one rank's best matrix product; NaN where it is not known.
    """

    def __init__(
        self,
        trainer: Trainer,
        held_out: TrainingSet | None,
        directory: RunDirectory,
        trackers: Trackers,
        *,
        ceiling: float = math.nan,
    ) -> None:
        self.trainer, self.held_out, self.directory, self.trackers = trainer, held_out, directory, trackers
        self.config, self.world = trainer.config, trainer.world
        self.ceiling = ceiling * self.world.size
        self._lines: list[dict[str, Any]] = []  # of metrics.jsonl, on every rank
        cost = ForwardCost.of(trainer.model)
        # Backward, every matrix product of the forward pass has two; one where the matrix itself stays as it is.
        passes = 3 if self.config.lora is None else 2
        self._flop = lambda lengths, scored: (passes + self.config.gradient_checkpointing) * cost.flop(lengths, scored)

    def run(self, interrupts: Interrupts) -> Timing:
        """All steps that are left.

        Raises:
            DivergedError: a step blows up; nothing finished is lost.
            KeyboardInterrupt: stopped; the finished steps are kept.
        """
        trainer, directory = self.trainer, self.directory
        timing = Timing(directory.resume(trainer.trained, trainer.optimizer))
        first = done = timing.resumed_from or 0
        self._lines = directory.metrics()
        guard = Guard(self.config.max_loss_jump, self.config.max_norm_ratio, self._lines)
        with self._nothing_lost(interrupts) as state, self._display(first) as show:
            state.done = state.saved = done
            going = self._evaluate(done)
            while going and done < trainer.steps:
                started = time.monotonic()
                measured = trainer.measure(done)
                if fault := guard.fault(measured.loss, measured.grad_norm):
                    state.agreed = True
                    rows = trainer.data.where(measured.rows)
                    raise DivergedError(
                        f"step {done + 1}: {fault.what}", f"{fault.remedy}; training stops before it. Its rows: {rows}"
                    )
                with interrupts.held():
                    state.whole = False
                    trainer.update(done)
                    done += 1
                    self._log(self._line(measured, done, time.monotonic() - started, timing))
                    state.done, state.whole = done, True
                    if self.config.save_every and done % self.config.save_every == 0:
                        state.save()
                show(done, measured, timing)
                going = self._evaluate(done)
                # The ranks stop after the same step, or one would wait for the others for ever.
                if self.world.size > 1 and self.world.any(interrupts.waiting, trainer.student.device):
                    state.agreed = True
                    raise KeyboardInterrupt
            if self.config.save_every:
                state.save()  # what follows may fail too
        return timing

    @contextmanager
    def _nothing_lost(self, interrupts: Interrupts) -> Iterator["_State"]:
        state = _State(self)
        # Of several ranks, a signal waits for all of them.
        with interrupts.held() if self.world.size > 1 else nullcontext():
            try:
                yield state
            except (KeyboardInterrupt, torch.OutOfMemoryError, UserError):
                # All ranks write a state together: what has befallen one of them, the others do not know.
                if state.whole and (self.world.size == 1 or state.agreed):
                    state.save()
                raise

    def _line(self, measured: Measured, done: int, seconds: float, timing: Timing) -> dict[str, Any]:
        """A line of metrics.jsonl; of a repeated run only the ``TIMED`` fields differ."""
        trainer = self.trainer
        flop = self._flop(trainer.data.lengths[measured.rows], measured.scored)
        timing.tokens += measured.tokens
        timing.seconds += seconds
        timing.flop += flop
        share = flop / seconds / self.ceiling
        return {
            "step": done,
            "epoch": (done - 1) // trainer.steps_per_epoch + 1,
            "loss": measured.loss,
            "lr": trainer.lr(done - 1),
            "grad_norm": measured.grad_norm,
            "tokens": measured.tokens,
            "tokens_per_s": round(measured.tokens / seconds, 1),
            "ceiling_share": round(share, 4) if math.isfinite(share) else None,
            "memory_bytes": memory_bytes(trainer.student.device),
        }

    def _evaluate(self, done: int) -> bool:
        """Log the held-out loss where it is due and not logged yet; whether the run is to go on."""
        every = self.config.eval_every or self.trainer.steps_per_epoch
        if self.held_out is None or (done % every and done < self.trainer.steps):
            return True
        if not (self._lines and "eval_loss" in self._lines[-1]):
            loss = self.trainer.evaluate(self.held_out)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"after step {done} the held-out loss is {loss}", "Lower --lr, or look at --eval-data"
                )
            epoch = -(-done // self.trainer.steps_per_epoch)
            self._log({"step": done, "epoch": epoch, "eval_loss": loss})
        if self.config.patience is None:
            return True
        losses = [line["eval_loss"] for line in self._lines if "eval_loss" in line]
        since_best = len(losses) - 1 - losses.index(min(losses))
        if since_best == 0:
            self.directory.save_best(done, self.trainer.trained)
        return since_best < self.config.patience

    def _log(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        if self.world.main:
            self.directory.log(line)
            self.trackers.log(line)

    @contextmanager
    def _display(self, first: int) -> "Iterator[Any]":
        if not self.world.main:
            yield lambda *_: None
            return
        with track("training", self.trainer.steps - first) as progress:
            throughput = Throughput(self.ceiling)

            def show(done: int, measured: Measured, timing: Timing) -> None:
                parts = [
                    f"loss {measured.loss:.4f}",
                    f"lr {self.trainer.lr(done - 1):.2e}",
                    throughput.detail(timing.tokens, timing.flop),
                    f"{memory_bytes(self.trainer.student.device) / 2**30:.1f} GiB",
                ]
                progress.update(done - first, ", ".join(parts))

            yield show


class _State:
    """What is on disk, and what would be lost."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.done, self.saved = loop, 0, 0
        self.whole = True  # weights, optimiser and log all stand at ``done`` steps
        self.agreed = False  # all ranks stop here, and know it

    def save(self) -> None:
        if self.done == self.saved:
            return
        trainer = self.loop.trainer
        self.loop.directory.save(self.done, trainer.trained, trainer.optimizer)
        self.saved = self.done


def memory_bytes(device: torch.device) -> int:
    """The most that this process has had: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
