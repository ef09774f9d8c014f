"""``lark-fast diagnose`` and ``lark-fast pilot``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lark_fast.cli.options import (
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
    problems: Annotated[int, typer.Option(help="How many problems to draw from the pool.")] = 40,
    candidates: Annotated[int, typer.Option(help="Of a problem, at most.")] = 8,
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
        out=str(out),
        problems=problems,
        candidates=candidates,
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
