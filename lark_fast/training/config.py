"""What a training run is asked to do, and what came of it."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lark_fast.rendering.renderer import RenderOptions
from lark_fast.training.objective import LossNorm

PRECISIONS = ("auto", "float32", "bfloat16")
OptimizerName = Literal["adamw", "adamw8bit"]
Tracker = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters on the student's matrices; the defaults are the paper's.

    Attributes:
        rank: r, of each adapter.
        alpha: an adapter's product is scaled by alpha / r.
        dropout: on an adapter's input.
        targets: names of the modules that get one, or "all-linear": all linear layers but the head.
        merge: leave the merged model in place of the adapter.

    Raises:
        ValueError: a value out of range.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("all-linear",)
    merge: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora rank is at least 1, not {self.rank}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora alpha is a positive number, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora dropout lies in [0, 1), not {self.dropout}")
        if not self.targets:
            raise ValueError("lora targets name at least one module, or all-linear")


# The recipes of arXiv 2605.30651. Both: cosine schedule, warm-up 0.05, clip 1.0, 32k tokens, which are the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "full": {"lr": 1e-5, "epochs": 5, "global_batch": 64},
    "lora": {"lr": 1e-4, "epochs": 3, "global_batch": 64, "lora": LoraOptions()},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What ``lark-fast train`` was asked to do.

    Attributes:
        data: JSONL (or any pool format) of conversations or token ids with a ``weight`` each.
        student: directory or hub id of the model to start from; an adapter is merged into its base first.
        base: of an adapter, instead of the one that it names.
        out: directory of the checkpoint; the same config again goes on where it stopped.
        eval_data: held-out trajectories; their mean nll is measured before training and after each epoch.
        eval_every: steps between these measurements instead of an epoch.
        patience: stop when so many measurements in a row were no better than the best, and leave the best weights.
        probe: trajectories whose nll before and after training is written to probe.parquet.
        epochs: passes over the data.
        max_steps: stop after so many, whatever ``epochs`` says; the schedule ends there.
        lr: peak learning rate.
        global_batch: trajectories of a step.
        micro_batch: trajectories of a forward pass, or None for as many as fit ``tokens_per_batch``. It changes memory
            and speed, never the objective.
        tokens_per_batch: tokens of a forward pass, unless a single trajectory has more; None: by the device.
        packing: put the trajectories of a pass into one row, where the student can be packed; else rows are padded.
        warmup_ratio: share of the steps in which the rate rises.
        weight_decay: of AdamW, on matrices only.
        betas: of AdamW.
        clip: largest gradient norm of a step; 0 does not clip.
        optimizer: "adamw", or "adamw8bit": moments in 8 bits (bitsandbytes).
        max_loss_jump: nats; a step whose loss lies further above the median of recent steps ends the run; 0: never.
        max_norm_ratio: a step whose gradient norm is so many times the median of recent steps ends it; 0: never.
        loss_norm: "trajectory" weighs trajectories, "token" weighs tokens; see ``lark_fast.training.objective``.
        dtype: "float32", "bfloat16" (products in bfloat16 over float32 master weights), or "auto": bfloat16 on a GPU
            or a CPU that has it in hardware.
        stochastic_rounding: no master weights: bfloat16 weights, rounded up or down by chance after each step so that
            small steps count in the mean. Saves 2 bytes of 4 a parameter.
        lora: train adapters only, or None for all weights.
        device: "auto", "cpu", "cuda", ...
        seed: of the order of the data and of dropout.
        save_every: steps between resume states; 0 keeps none.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        compile: run the layers through ``torch.compile``; packs are filled up to one shape.
        trackers: also log to "tensorboard" and "wandb", into ``out``.
        options: how conversations become tokens.
        chat_template: a Jinja template in place of the tokenizer's own.
        overwrite: throw away an earlier run in ``out``.
        trust_remote_code: run model code that the student brings along.

    Raises:
        ValueError: a value out of range.
    """

    data: str
    student: str
    out: str
    base: str | None = None
    eval_data: str | None = None
    eval_every: int | None = None
    patience: int | None = None
    probe: str | None = None
    epochs: int = 3
    max_steps: int | None = None
    lr: float = 1e-5
    global_batch: int = 64
    micro_batch: int | None = None
    tokens_per_batch: int | None = None
    packing: bool = True
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    optimizer: OptimizerName = "adamw"
    max_loss_jump: float = 3.0
    max_norm_ratio: float = 0.0
    loss_norm: LossNorm = "trajectory"
    dtype: str = "auto"
    stochastic_rounding: bool = False
    lora: LoraOptions | None = None
    device: str = "auto"
    seed: int = 0
    save_every: int = 100
    gradient_checkpointing: bool = False
    compile: bool = False
    trackers: tuple[Tracker, ...] = ()
    options: RenderOptions = field(default_factory=RenderOptions)
    chat_template: str | None = None  # the template itself
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        for name in ("micro_batch", "tokens_per_batch", "max_steps", "eval_every", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        for name in ("eval_every", "patience"):
            if getattr(self, name) is not None and self.eval_data is None:
                raise ValueError(f"{name} needs eval_data")
        for name in ("weight_decay", "clip", "seed", "save_every", "max_loss_jump", "max_norm_ratio"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is finite and at least 0, not {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is a positive number, not {self.lr}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio lies between 0 and 1, not {self.warmup_ratio}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas lie in [0, 1), not {self.betas}")
        for name, known in (
            ("loss_norm", get_args(LossNorm)),
            ("dtype", PRECISIONS),
            ("optimizer", get_args(OptimizerName)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.stochastic_rounding and (self.lora or self.dtype == "float32" or self.optimizer != "adamw"):
            raise ValueError("stochastic_rounding is for bfloat16 weights that are all trained, with optimizer adamw")
        unknown = [name for name in self.trackers if name not in get_args(Tracker)]
        if unknown:
            raise ValueError(f"trackers are out of {', '.join(get_args(Tracker))}, not {', '.join(unknown)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """What came of a run, earlier parts of it included where it was resumed (timing apart)."""

    out: str
    trajectories: int  # trained on
    dropped: int  # rows of weight 0
    truncated: int  # trajectories cut at the maximum length
    steps: int
    first_loss: float  # of the first step
    last_loss: float
    eval_losses: tuple[float, ...]  # held out: before training, then as often as asked; empty without eval_data
    best_step: int | None  # after which the weights were best, where ``patience`` is given: these are the ones left
    probe: str  # what probe.parquet says; empty without a probe
    already_complete: bool  # there was nothing left to do
    resumed_from: int | None  # the step that the last part of the run went on from
    seconds: float  # of the last part's steps
    tokens_per_second: float  # input tokens of the last part
    rank: int = 0  # of the process that says so

    def lines(self) -> list[str]:
        """What to tell the user, once."""
        if self.rank:
            return []
        if self.already_complete:
            return [f"{self.out}: this run is complete ({self.steps:,} steps); nothing was done"]
        dropped = f", {self.dropped:,} rows of weight 0 left out" if self.dropped else ""
        truncated = f", {self.truncated:,} truncated" if self.truncated else ""
        lines = [
            f"{self.steps:,} steps over {self.trajectories:,} trajectories{dropped}{truncated}: "
            f"loss {self.first_loss:.4f} -> {self.last_loss:.4f}",
            f"{self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s"
            + (f", from step {self.resumed_from:,} on" if self.resumed_from is not None else ""),
        ]
        if self.eval_losses:
            last = self.eval_losses[-1] if self.best_step is None else min(self.eval_losses)
            best = "" if self.best_step is None else f", best after step {self.best_step:,}"
            lines.append(f"held-out nll {self.eval_losses[0]:.4f} -> {last:.4f}{best}")
        if self.probe:
            lines.append(self.probe)
        return [*lines, f"{self.out}: checkpoint, metrics.jsonl"]
