"""``lark-fast diagnose`` and ``lark-fast pilot``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lark_fast.cli.options import (
    BaseOption,
    DeviceOption,
    LastTurnOption,
    Long,
    MaxLengthOption,
    OverwriteOption,
    PoolOption,
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


class Parameters(StrEnum):
    """Whose gradients are taken."""

    all = "all"
    last_layer = "last-layer"
    lora = "lora"


def diagnose(
    pool: PoolOption,
    student: StudentOption,
    out: Annotated[Path, typer.Option(help="Directory; the same command again goes on with the next problem.")],
    base: BaseOption = None,
    problems: Annotated[int, typer.Option(help="How many problems to draw from the pool.")] = 40,
    candidates: Annotated[int, typer.Option(help="Of a problem, at most.")] = 8,
    where: Annotated[
        list[str] | None, typer.Option(help="COLUMN or COLUMN=VALUE of the pool: look at such trajectories alone.")
    ] = None,
    parameters: Annotated[
        Parameters, typer.Option(help="Gradients of all parameters, the output embedding, or LoRA adapters.")
    ] = Parameters.all,
    budget: Annotated[int, typer.Option(help="Candidates that a selection would keep of a problem.")] = 3,
    lr: Annotated[float, typer.Option(help="Of the AdamW steps whose loss delta is measured.")] = 1e-5,
    steps: Annotated[int, typer.Option(help="AdamW steps that a rate is measured over.")] = 2,
    top_k: Annotated[int | None, typer.Option(min=1, help="Brier score over so many logits; default: exact.")] = None,
    max_length: MaxLengthOption = 32768,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16 or auto. Gradients in bfloat16 have three digits.")
    ] = "float32",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    span: SpanOption = Span.turn,
    render: RenderOption = Render.template,
    system: SystemOption = System.keep,
    chat_template: TemplateOption = None,
    last_turn_only: LastTurnOption = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Does g_hat order trajectories as this student's own gradients do, and as real steps do?"""
    from lark_fast.diagnosis.config import DiagnoseConfig
    from lark_fast.diagnosis.run import diagnose as run

    config = checked(
        DiagnoseConfig,
        pool=tuple(pool),
        student=student,
        base=base,
        out=str(out),
        problems=problems,
        candidates=candidates,
        where=tuple(where or ()),
        parameters=parameters.value,
        budget=budget,
        lr=lr,
        steps=steps,
        top_k=top_k,
        dtype=dtype,
        device=device,
        seed=seed,
        options=render_options(span, render, system, last_turn_only, Long.truncate, max_length),
        chat_template=read_template(chat_template),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    for line in run(config).lines():
        say(line)


def pilot(
    pool: PoolOption,
    student: StudentOption,
    out: Annotated[Path, typer.Option(help="Directory; the same command again goes on with the next run.")],
    base: BaseOption = None,
    policies: Annotated[
        str, typer.Option(help="Of select, and full; commas between. random is what others are compared with.")
    ] = "chi2,topb,random,nll,rsr,full",
    seeds: Annotated[int, typer.Option(help="Runs of each; more can be added later.")] = 3,
    buckets: Annotated[int, typer.Option(help="Parts by rank of g_hat that are trained on one by one; 0: none.")] = 5,
    budget: Annotated[int, typer.Option(help="Candidates that a policy keeps of a problem.")] = 3,
    tokens: Annotated[int | None, typer.Option(help="Input tokens of a run. Default: 50 average steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: 1e-5, with --lora 1e-4.")] = None,
    global_batch: Annotated[int, typer.Option(help="Trajectories of a step.")] = 16,
    evaluations: Annotated[int, typer.Option(help="Held-out losses of a run after the one at its start.")] = 4,
    problems: Annotated[int, typer.Option(help="Problems to score and train on, at most; drawn by chance.")] = 1000,
    held_out: Annotated[
        str | None, typer.Option(help="Trajectories to measure the loss on. Default: problems of the pool.")
    ] = None,
    held_out_problems: Annotated[int, typer.Option(help="How many of these; a fifth of the pool at most.")] = 50,
    where: Annotated[
        list[str] | None, typer.Option(help="COLUMN or COLUMN=VALUE of the pool: use such trajectories alone.")
    ] = None,
    held_out_where: Annotated[
        list[str] | None, typer.Option(help="The same: of the held-out ones, measure such alone.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Brier score over so many logits; default: exact.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters (the defaults of train --lora).")] = False,
    tokens_per_batch: Annotated[str, typer.Option(help="Tokens of a training pass, or auto: by the device.")] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, slower.")
    ] = False,
    max_length: MaxLengthOption = 32768,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: where it helps.")] = "auto",
    device: DeviceOption = "auto",
    span: SpanOption = Span.turn,
    render: RenderOption = Render.template,
    system: SystemOption = System.keep,
    chat_template: TemplateOption = None,
    last_turn_only: LastTurnOption = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Leave the trained weights in runs/, for eval.")
    ] = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Which selection makes this student better? Short runs of equal tokens, side by side."""
    from lark_fast.pilot.config import PilotConfig
    from lark_fast.pilot.run import pilot as run
    from lark_fast.training.config import PRESETS, LoraOptions

    config = checked(
        PilotConfig,
        pool=tuple(pool),
        student=student,
        base=base,
        out=str(out),
        policies=tuple(filter(None, map(str.strip, policies.split(",")))),
        seeds=seeds,
        buckets=buckets,
        budget=budget,
        tokens=tokens,
        lr=PRESETS["lora" if lora else "full"]["lr"] if lr is None else lr,
        global_batch=global_batch,
        evaluations=evaluations,
        problems=problems,
        held_out=held_out,
        held_out_problems=held_out_problems,
        where=tuple(where or ()),
        held_out_where=tuple(held_out_where or ()),
        top_k=top_k,
        lora=LoraOptions() if lora else None,
        dtype=dtype,
        device=device,
        tokens_per_batch=number_or_auto(tokens_per_batch, "--tokens-per-batch", at_least=1),
        gradient_checkpointing=gradient_checkpointing,
        options=render_options(span, render, system, last_turn_only, Long.truncate, max_length),
        chat_template=read_template(chat_template),
        keep_checkpoints=keep_checkpoints,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    for line in run(config, say).lines():
        say(line)
