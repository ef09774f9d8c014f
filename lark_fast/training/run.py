"""``lark-fast train``: weighted supervised fine-tuning of a student on a selection."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lark_fast.errors import UserError
from lark_fast.files import refuse_overlap
from lark_fast.flop import matmul_ceiling
from lark_fast.interrupts import Interrupts
from lark_fast.rendering.renderer import Renderer
from lark_fast.student import Student, choose_device, load_student, multiplies_bfloat16
from lark_fast.student_files import find_student
from lark_fast.training.card import data_manifest, model_card
from lark_fast.training.config import TrainConfig, TrainSummary
from lark_fast.training.data import TrainingSet, load_training_set
from lark_fast.training.loop import Loop, Timing
from lark_fast.training.model import refuse_untrainable
from lark_fast.training.output import checkpoint_dtype, draw_losses, write_checkpoint
from lark_fast.training.probe import write_probe
from lark_fast.training.state import RunDirectory
from lark_fast.training.step import Trainer
from lark_fast.training.trackers import Trackers
from lark_fast.versions import versions
from lark_fast.world import World, started_by_torchrun

# What decides the numbers but for rounding; device, micro-batches, packing, recomputation and ranks only decide how.
IDENTITY = (
    "epochs", "max_steps", "lr", "global_batch", "warmup_ratio", "weight_decay", "betas", "clip", "optimizer",
    "stochastic_rounding", "loss_norm", "seed", "eval_every", "patience",
)  # fmt: skip
LORA_IDENTITY = ("rank", "alpha", "dropout", "targets", "merge")


def train(config: TrainConfig) -> TrainSummary:
    """Fine-tune a student; called again with the same config, go on where an earlier call was stopped.

    Started by torchrun, all ranks work on one run: parameters, gradients and moments are spread over them.

    Returns:
        Counts, losses and timing; ``already_complete`` where there was nothing left to do.

    Raises:
        UserError: bad input, a directory that belongs to another run, no memory.
        DivergedError: a loss or gradient jumps or is not finite.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM; the finished steps are kept.
    """
    with started_by_torchrun(config.device) as (world, device):
        return _train(config, world, device)


def _train(config: TrainConfig, world: World, device: str) -> TrainSummary:
    files = {"--data": config.data, "--eval-data": config.eval_data, "--probe": config.probe}
    read = {option: [Path(path)] for option, path in files.items() if path is not None}
    sources = find_student(config.student, config.base)
    refuse_overlap(config.out, {"--student": sources.directories, **read})
    refuse_untrainable(sources, config.lora, ranks=world.size)
    # On an EPYC with avx512_bf16 a step is 1.05 to 1.3 times as fast for students of 1 to 160 M parameters.
    bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and multiplies_bfloat16(choose_device(device)))
    if config.stochastic_rounding and not bfloat16:
        raise UserError("--stochastic-rounding is for bfloat16, which this device has not; give --dtype bfloat16")
    if config.stochastic_rounding and world.size > 1:
        raise UserError("--stochastic-rounding is for one process: over ranks, float32 weights are spread anyway")
    # What is not trained, or rounded stochastically, needs no float32 copy.
    low = bfloat16 and (config.lora is not None or config.stochastic_rounding)
    student = load_student(
        sources,
        device=device,
        dtype="bfloat16" if low else "float32",
        trust_remote_code=config.trust_remote_code,
    )
    options = config.options.fitting(student.max_positions)
    renderer = Renderer(student.tokenizer, options, vocab_size=student.vocab_size, chat_template=config.chat_template)
    data = load_training_set(config.data, renderer, quiet=not world.main)
    held_out, probe = (
        None if path is None else load_training_set(path, renderer, weighted=False, quiet=not world.main)
        for path in (config.eval_data, config.probe)
    )
    if data.truncated and world.main:
        cut = f"{data.truncated} of {len(data)} trajectories are cut at {options.max_length} tokens"
        print(f"lark-fast: {cut}", file=sys.stderr)
    identity = {
        "student": sources.fingerprint(),
        "data": data.hash(),
        "eval_data": None if held_out is None else held_out.hash(),
        "probe": None if probe is None else probe.hash(),
        "template": renderer.template_hash,
        "dtype": "bfloat16" if bfloat16 else "float32",
        **{name: getattr(config, name) for name in IDENTITY},
        "lora": config.lora and {name: getattr(config.lora, name) for name in LORA_IDENTITY},
        **asdict(options),
    }
    with RunDirectory(config.out, identity, overwrite=config.overwrite, world=world) as directory:
        return _train_into(directory, student, data, held_out, probe, config, bfloat16=bfloat16)


def _train_into(
    directory: RunDirectory,
    student: Student,
    data: TrainingSet,
    held_out: TrainingSet | None,
    probe: TrainingSet | None,
    config: TrainConfig,
    *,
    bfloat16: bool,
) -> TrainSummary:
    """What is left of the run whose directory it is."""
    world = directory.world
    if directory.complete:
        if world.main:
            directory.forget_states()
        return _summary(directory, already_complete=True)
    if config.packing and student.unpackable and world.main:
        print(f"lark-fast: trajectories are padded, not packed: {student.unpackable}", file=sys.stderr)
    trackers = Trackers(config, directory.identity, directory.steps_kept, silent=not world.main)
    devices = [student.device] if student.device.type == "cuda" else []
    with torch.random.fork_rng(devices), Interrupts() as interrupts:
        try:
            trainer = Trainer(student, data, config, bfloat16=bfloat16, world=world)
            _keep_probe(trainer, probe, directory)
            ceiling = matmul_ceiling(student.device, torch.bfloat16 if bfloat16 else torch.float32)
            timing = Loop(trainer, held_out, directory, trackers, ceiling=ceiling).run(interrupts)
            with interrupts.held():
                return _finish(trainer, probe, directory, timing)
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the GPU has no memory left: lower --tokens-per-batch, give --gradient-checkpointing, or lower "
                "--max-length"
            ) from error
        finally:
            trackers.close()


def _keep_probe(trainer: Trainer, probe: TrainingSet | None, directory: RunDirectory) -> None:
    """Measure the probe before the first step, unless a stopped run has."""
    if probe is not None and directory.probe() is None:
        if directory.steps_kept:
            raise UserError(f"--out {directory.path}: the probe's nll from before training is lost; --overwrite")
        nll = trainer.nll(probe)
        if trainer.world.main:
            directory.keep_probe(nll)
        trainer.world.wait()


def _finish(trainer: Trainer, probe: TrainingSet | None, directory: RunDirectory, timing: Timing) -> TrainSummary:
    """Checkpoint, picture, card and manifest, in this order: the manifest says that the others are there."""
    config, data, world = trainer.config, trainer.data, trainer.world
    metrics = directory.metrics()
    losses = [line["loss"] for line in metrics if "loss" in line]
    steps = max(line["step"] for line in metrics)
    best_step = None if config.patience is None else directory.load_best(trainer.trained)
    before, after = (None, None) if probe is None else (directory.probe(), trainer.nll(probe))
    facts = {
        "config": asdict(config),
        "counts": {
            "trajectories": len(data),
            "dropped": data.dropped,
            "truncated": data.truncated,
            "input_tokens": len(data.ids),
            "scored_tokens": int(data.n_scored.sum()),
            "steps": steps,
        },
        "losses": {
            "first": losses[0],
            "last": losses[-1],
            "held_out": [line["eval_loss"] for line in metrics if "eval_loss" in line],
        },
        "best_step": best_step,
        "timing": {
            "resumed_from": timing.resumed_from,
            "seconds": round(timing.seconds, 3),
            "tokens_per_second": round(timing.tokens_per_second, 1),
        },
        "versions": versions("torch", "transformers"),
        "device": str(trainer.student.device),
        "ranks": world.size,
        "probe": "",
    }
    dtype = checkpoint_dtype(trainer.student.files, trust_remote_code=config.trust_remote_code)
    with directory.checkpoint() as files:
        write_checkpoint(
            trainer, files, dtype=dtype, chat_template=config.chat_template, with_code=config.trust_remote_code
        )
        if world.main:
            draw_losses(metrics, files / "loss.png")
            if probe is not None:
                facts["probe"] = write_probe(files, probe, before, after, best_step or steps)
            adapter = config.lora is not None and not config.lora.merge
            card = model_card(facts | {"identity": directory.identity}, data_manifest(config.data), adapter=adapter)
            (files / "README.md").write_text(card, encoding="utf-8")
    if world.main:
        directory.write_manifest(complete=True, **facts, files=directory.manifest["files"])
        directory.forget_states()
    world.wait()
    return _summary(directory, facts | {"identity": directory.identity})


def _summary(
    directory: RunDirectory, manifest: dict[str, Any] | None = None, *, already_complete: bool = False
) -> TrainSummary:
    """What the manifest of a complete run says."""
    manifest = manifest or directory.manifest
    counts, losses, timing = (manifest[name] for name in ("counts", "losses", "timing"))
    return TrainSummary(
        out=str(directory.path),
        trajectories=counts["trajectories"],
        dropped=counts["dropped"],
        truncated=counts["truncated"],
        steps=counts["steps"],
        first_loss=losses["first"],
        last_loss=losses["last"],
        eval_losses=tuple(losses["held_out"]),
        best_step=manifest["best_step"],
        probe=manifest["probe"],
        already_complete=already_complete,
        rank=directory.world.rank,
        **timing,
    )
