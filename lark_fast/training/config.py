"""What a training run is asked to do, and what came of it."""

from dataclasses import dataclass, field
from typing import get_args

from lark_fast.rendering.renderer import RenderOptions
from lark_fast.training.objective import LossNorm

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What ``lark-fast train`` was asked to do.

    Attributes:
        data: JSONL (or any pool format) of conversations or token ids with a ``weight`` each.
        student: directory or hub id of the model to start from.
        out: directory of the checkpoint; the same config again goes on where it stopped.
        eval_data: held-out trajectories; their mean nll is measured before training and after each epoch.
        epochs: passes over the data.
        lr: peak learning rate.
        global_batch: trajectories of a step.
        micro_batch: trajectories of a forward pass, or None for as many as fit a budget of tokens. It changes memory
            and speed, never the objective.
        warmup_ratio: share of the steps in which the rate rises.
        weight_decay: of AdamW, on matrices only.
        betas: of AdamW.
        clip: largest gradient norm of a step; 0 does not clip.
        loss_norm: "trajectory" weighs trajectories, "token" weighs tokens; see ``lark_fast.training.objective``.
        dtype: "float32", "bfloat16" (autocast over float32 master weights), or "auto": bfloat16 on a GPU or a CPU that
            has it in hardware.
        device: "auto", "cpu", "cuda", ...
        seed: of the order of the data and of dropout.
        save_every: steps between resume states; 0 keeps none.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
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
    eval_data: str | None = None
    epochs: int = 3
    lr: float = 1e-5
    global_batch: int = 64
    micro_batch: int | None = None
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    loss_norm: LossNorm = "trajectory"
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    save_every: int = 100
    gradient_checkpointing: bool = False
    options: RenderOptions = field(default_factory=RenderOptions)
    chat_template: str | None = None  # the template itself
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch is at least 1, not {self.micro_batch}")
        for name in ("weight_decay", "clip", "seed", "save_every"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is finite and at least 0, not {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is a positive number, not {self.lr}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio lies between 0 and 1, not {self.warmup_ratio}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas lie in [0, 1), not {self.betas}")
        if self.loss_norm not in get_args(LossNorm):
            raise ValueError(f"loss_norm is one of {', '.join(get_args(LossNorm))}, not {self.loss_norm!r}")
        if self.dtype not in PRECISIONS:
            raise ValueError(f"dtype is one of {', '.join(PRECISIONS)}, not {self.dtype!r}")


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
    eval_losses: tuple[float, ...]  # before training, then after each epoch; empty without eval_data
    already_complete: bool  # there was nothing left to do
    resumed_from: int | None  # the step that the last part of the run went on from
    seconds: float  # of the last part's steps
    tokens_per_second: float  # input tokens of the last part

    def lines(self) -> list[str]:
        """What to tell the user."""
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
            lines.append(f"held-out nll {self.eval_losses[0]:.4f} -> {self.eval_losses[-1]:.4f}")
        return [*lines, f"{self.out}: checkpoint, metrics.jsonl"]
