"""``lark-fast train``: weighted supervised fine-tuning of a student on a selection."""

import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lark_fast
from lark_fast.errors import UserError
from lark_fast.files import refuse_overlap
from lark_fast.interrupts import Interrupts
from lark_fast.progress import Progress, track
from lark_fast.rendering.renderer import Renderer
from lark_fast.student import fingerprint, load_student, multiplies_bfloat16, student_files
from lark_fast.training.config import TrainConfig, TrainSummary
from lark_fast.training.data import TrainingSet, load_training_set
from lark_fast.training.output import checkpoint_dtype, draw_losses, write_checkpoint
from lark_fast.training.state import RunDirectory
from lark_fast.training.step import Measured, Trainer

# What decides the numbers but for rounding; device, micro_batch and gradient_checkpointing only decide how.
IDENTITY = (
    "epochs", "lr", "global_batch", "warmup_ratio", "weight_decay", "betas", "clip", "loss_norm", "seed",
)  # fmt: skip


def train(config: TrainConfig) -> TrainSummary:
    """Fine-tune a student; called again with the same config, go on where an earlier call was stopped.

    Returns:
        Counts, losses and timing; ``already_complete`` where there was nothing left to do.

    Raises:
        UserError: bad input, a directory that belongs to another run, no memory, a loss or gradient that is not finite.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM; the finished steps are kept.
    """
    read = {"--student": [student_files(config.student)], "--data": [Path(config.data)]}
    refuse_overlap(config.out, read | ({"--eval-data": [Path(config.eval_data)]} if config.eval_data else {}))
    student = load_student(
        config.student, device=config.device, dtype="float32", trust_remote_code=config.trust_remote_code
    )
    # On an EPYC with avx512_bf16 a step is 1.05 to 1.3 times as fast for students of 1 to 160 M parameters.
    bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and multiplies_bfloat16(student.device))
    options = config.options.fitting(student.max_positions)
    renderer = Renderer(student.tokenizer, options, vocab_size=student.vocab_size, chat_template=config.chat_template)
    data = load_training_set(config.data, renderer)
    held_out = None if config.eval_data is None else load_training_set(config.eval_data, renderer, weighted=False)
    if data.truncated:
        cut = f"{data.truncated} of {len(data)} trajectories are cut at {options.max_length} tokens"
        print(f"lark-fast: {cut}", file=sys.stderr)
    identity = {
        "student": fingerprint(config.student),
        "data": data.hash(),
        "eval_data": None if held_out is None else held_out.hash(),
        "template": renderer.template_hash,
        "dtype": "bfloat16" if bfloat16 else "float32",
        **{name: getattr(config, name) for name in IDENTITY},
        **asdict(options),
    }
    directory = RunDirectory(config.out, identity, overwrite=config.overwrite)
    if directory.complete:
        directory.forget_states()
        return _summary(directory, already_complete=True)
    trainer = Trainer(student, data, config, bfloat16=bfloat16)
    devices = [student.device] if student.device.type == "cuda" else []
    with torch.random.fork_rng(devices), Interrupts() as interrupts:
        try:
            timing = _run(trainer, held_out, directory, interrupts)
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the GPU has no memory left: lower --micro-batch, give --gradient-checkpointing, or lower --max-length"
            ) from error
        with interrupts.held():
            return _finish(config, trainer, directory, timing)


@dataclass(slots=True)
class _Timing:
    """Of the steps of this call."""

    resumed_from: int | None
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def _run(trainer: Trainer, held_out: TrainingSet | None, directory: RunDirectory, interrupts: Interrupts) -> _Timing:
    """All steps that are not done yet."""
    config = trainer.config
    timing = _Timing(directory.resume(trainer.model, trainer.optimizer))
    first = done = saved = timing.resumed_from or 0
    whole = True  # weights, optimiser and log all stand at `done` steps
    try:
        _evaluate(trainer, held_out, directory, done)
        with track("training", trainer.steps - first) as progress:
            for step in range(first, trainer.steps):
                started = time.monotonic()
                measured = trainer.measure(step)
                _refuse_what_is_not_finite(measured, step, trainer.data)
                with interrupts.held():
                    whole = False
                    trainer.update(step)
                    seconds = time.monotonic() - started
                    timing.tokens += measured.tokens
                    timing.seconds += seconds
                    directory.log(_line(trainer, measured, step, seconds))
                    done, whole = step + 1, True
                    if config.save_every and done % config.save_every == 0:
                        directory.save(done, trainer.model, trainer.optimizer)
                        saved = done
                _show(progress, done - first, measured, timing)
                _evaluate(trainer, held_out, directory, done)
    except (KeyboardInterrupt, torch.OutOfMemoryError):
        if whole and done > saved:
            directory.save(done, trainer.model, trainer.optimizer)
        raise
    return timing


def _line(trainer: Trainer, measured: Measured, step: int, seconds: float) -> dict[str, Any]:
    """A line of metrics.jsonl; only tokens_per_s differs when a run is repeated."""
    return {
        "step": step + 1,
        "epoch": step // trainer.steps_per_epoch + 1,
        "loss": measured.loss,
        "lr": trainer.lr(step),
        "grad_norm": measured.grad_norm,
        "tokens": measured.tokens,
        "tokens_per_s": round(measured.tokens / seconds, 1),
    }


def _evaluate(trainer: Trainer, held_out: TrainingSet | None, directory: RunDirectory, done: int) -> None:
    """Log the held-out loss before the first step and after each epoch, unless a stopped run has logged it."""
    if held_out is None or done % trainer.steps_per_epoch:
        return
    metrics = directory.metrics()
    if metrics and "eval_loss" in metrics[-1]:
        return
    loss = trainer.evaluate(held_out)
    if not math.isfinite(loss):
        raise UserError(f"after step {done} the held-out loss is {loss}; lower --lr or look at --eval-data")
    directory.log({"step": done, "epoch": done // trainer.steps_per_epoch, "eval_loss": loss})


def _refuse_what_is_not_finite(measured: Measured, step: int, data: TrainingSet) -> None:
    if not (math.isfinite(measured.loss) and math.isfinite(measured.grad_norm)):
        raise UserError(
            f"step {step + 1}: the loss is {measured.loss:.6g}, the gradient norm {measured.grad_norm:.6g}; training "
            f"stops before it. Lower --lr, or look at the rows of this batch: {data.where(measured.rows)}"
        )


def _show(progress: Progress, done: int, measured: Measured, timing: _Timing) -> None:
    progress.update(done, f"loss {measured.loss:.4f}, {timing.tokens_per_second:,.0f} tokens/s")


def _finish(config: TrainConfig, trainer: Trainer, directory: RunDirectory, timing: _Timing) -> TrainSummary:
    """Checkpoint, picture and manifest, in this order: the manifest says that the others are there."""
    import transformers

    data, metrics = trainer.data, directory.metrics()
    dtype = checkpoint_dtype(config.student, trust_remote_code=config.trust_remote_code)
    with directory.checkpoint() as files:
        write_checkpoint(
            trainer.student,
            files,
            dtype=dtype,
            chat_template=config.chat_template,
            with_code=config.trust_remote_code,
        )
        draw_losses(metrics, files / "loss.png")
    losses = [line["loss"] for line in metrics if "loss" in line]
    directory.write_manifest(
        complete=True,
        config=asdict(config),
        counts={
            "trajectories": len(data),
            "dropped": data.dropped,
            "truncated": data.truncated,
            "input_tokens": len(data.ids),
            "scored_tokens": int(data.n_scored.sum()),
            "steps": trainer.steps,
        },
        losses={
            "first": losses[0],
            "last": losses[-1],
            "held_out": [line["eval_loss"] for line in metrics if "eval_loss" in line],
        },
        timing={
            "resumed_from": timing.resumed_from,
            "seconds": round(timing.seconds, 3),
            "tokens_per_second": round(timing.tokens_per_second, 1),
        },
        versions={
            "lark_fast": lark_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        device=str(trainer.student.device),
        files=directory.manifest["files"],
    )
    directory.forget_states()
    return _summary(directory)


def _summary(directory: RunDirectory, *, already_complete: bool = False) -> TrainSummary:
    """What the manifest of a complete run says."""
    counts, losses, timing = (directory.manifest[name] for name in ("counts", "losses", "timing"))
    return TrainSummary(
        out=str(directory.path),
        trajectories=counts["trajectories"],
        dropped=counts["dropped"],
        truncated=counts["truncated"],
        steps=counts["steps"],
        first_loss=losses["first"],
        last_loss=losses["last"],
        eval_losses=tuple(losses["held_out"]),
        already_complete=already_complete,
        **timing,
    )
