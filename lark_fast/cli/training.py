"""``lark-fast train``."""

from enum import StrEnum
from typing import Annotated

import typer

from lark_fast.cli.options import (
    BaseOption,
    DeviceOption,
    LastTurnOption,
    Long,
    MaxLengthOption,
    OverwriteOption,
    RemoteCodeOption,
    Render,
    RenderOption,
    Span,
    SpanOption,
    StudentOption,
    System,
    SystemOption,
    TemplateOption,
    checked,
    number_or_auto,
    read_template,
    render_options,
    say,
)


class LossNorm(StrEnum):
    """What the loss is a mean over."""

    trajectory = "trajectory"
    token = "token"


class Preset(StrEnum):
    """The paper's recipes."""

    full = "full"
    lora = "lora"


class Optimizer(StrEnum):
    """Forms of AdamW."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"


class Track(StrEnum):
    """Programs that draw a run while it goes."""

    tensorboard = "tensorboard"
    wandb = "wandb"


def train(
    data: Annotated[str, typer.Option(help="train.jsonl of a selection: messages and a weight each.")],
    student: StudentOption,
    out: Annotated[str, typer.Option(help="Directory of the checkpoint; the same command again goes on.")],
    base: BaseOption = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out trajectories: their nll before and after.")] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps between them. Default: an epoch.")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many of them without a gain; leave the best weights.")
    ] = None,
    probe: Annotated[str | None, typer.Option(help="Trajectories whose nll before and after is written.")] = None,
    preset: Annotated[
        Preset | None, typer.Option(help="The paper's recipe: full (lr 1e-5, 5 epochs) or lora (lr 1e-4, r 64).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 3, or the preset's.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: 1e-5, or the preset's.")] = None,
    global_batch: Annotated[int | None, typer.Option(min=1, help="Trajectories of a step. Default: 64.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Trajectories of a forward pass. Default: by --tokens-per-batch.")
    ] = None,
    tokens_per_batch: Annotated[str, typer.Option(help="Tokens of a forward pass, or auto: by the device.")] = "auto",
    packing: Annotated[
        bool, typer.Option("--packing/--no-packing", help="Trajectories of a pass in one row, or padded.")
    ] = True,
    warmup_ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps that warm up.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.0,
    clip: Annotated[float, typer.Option(min=0, help="Largest gradient norm of a step; 0: no limit.")] = 1.0,
    optimizer: Annotated[
        Optimizer, typer.Option(help="adamw8bit: moments in 8 bits (bitsandbytes).")
    ] = Optimizer.adamw,
    max_loss_jump: Annotated[
        float, typer.Option(min=0, help="Nats above recent losses at which to stop; 0: never.")
    ] = 3.0,
    max_norm_ratio: Annotated[
        float, typer.Option(min=0, help="Times the recent gradient norms at which to stop; 0: never.")
    ] = 0.0,
    loss_norm: Annotated[LossNorm, typer.Option(help="Weigh trajectories or tokens.")] = LossNorm.trajectory,
    lora: Annotated[bool | None, typer.Option("--lora/--no-lora", help="Train adapters only (peft).")] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Default: 64.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Adapters are scaled by alpha / rank. Default: 128.")] = None,
    lora_dropout: Annotated[float | None, typer.Option(min=0, max=1, help="Default: 0.05.")] = None,
    lora_target: Annotated[
        list[str] | None, typer.Option(help="A module that gets an adapter (repeatable). Default: all-linear.")
    ] = None,
    lora_merge: Annotated[bool, typer.Option("--lora-merge", help="Leave the merged model, not the adapter.")] = False,
    max_length: MaxLengthOption = 32768,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 (over float32 master weights), or auto: where it helps.")
    ] = "auto",
    stochastic_rounding: Annotated[
        bool, typer.Option("--stochastic-rounding", help="bfloat16 weights without a float32 copy.")
    ] = False,
    device: DeviceOption = "auto",
    seed: int = 0,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between resume states; 0: none.")] = 100,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, slower.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Run the layers through torch.compile.")] = False,
    track: Annotated[list[Track] | None, typer.Option(help="Also log to tensorboard, wandb (repeatable).")] = None,
    span: SpanOption = Span.turn,
    render: RenderOption = Render.template,
    system: SystemOption = System.keep,
    chat_template: TemplateOption = None,
    last_turn_only: LastTurnOption = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Fine-tune the student on weighted trajectories."""
    from lark_fast.errors import UserError
    from lark_fast.training.config import PRESETS, LoraOptions, TrainConfig
    from lark_fast.training.run import train as run

    recipe = PRESETS[preset.value] if preset else {}
    adapters = {
        "rank": lora_rank,
        "alpha": lora_alpha,
        "dropout": lora_dropout,
        "targets": tuple(lora_target) if lora_target else None,
        "merge": lora_merge or None,
    }
    adapters = {name: value for name, value in adapters.items() if value is not None}
    if lora is False or (lora is None and "lora" not in recipe):
        if adapters:
            raise UserError(f"--lora-{next(iter(adapters)).removesuffix('s')} needs --lora")
        recipe = recipe | {"lora": None}
    else:
        recipe = recipe | {"lora": checked(LoraOptions, **adapters)}
    given = {"epochs": epochs, "lr": lr, "global_batch": global_batch}
    recipe = recipe | {name: value for name, value in given.items() if value is not None}
    config = checked(
        TrainConfig,
        data=data,
        student=student,
        base=base,
        out=out,
        eval_data=eval_data,
        eval_every=eval_every,
        patience=patience,
        probe=probe,
        **recipe,
        max_steps=max_steps,
        micro_batch=micro_batch,
        tokens_per_batch=number_or_auto(tokens_per_batch, "--tokens-per-batch", at_least=1),
        packing=packing,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        clip=clip,
        optimizer=optimizer.value,
        max_loss_jump=max_loss_jump,
        max_norm_ratio=max_norm_ratio,
        loss_norm=loss_norm.value,
        dtype=dtype,
        stochastic_rounding=stochastic_rounding,
        device=device,
        seed=seed,
        save_every=save_every,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
        trackers=tuple(dict.fromkeys(name.value for name in track or ())),
        options=render_options(span, render, system, last_turn_only, Long.truncate, max_length),
        chat_template=read_template(chat_template),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    for line in run(config).lines():
        say(line)
