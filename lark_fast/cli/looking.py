"""``lark-fast inspect`` and ``lark-fast demo``."""

from pathlib import Path
from typing import Annotated

import typer

from lark_fast.cli.options import (
    BaseOption,
    LastTurnOption,
    Long,
    LongOption,
    MaxLengthOption,
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
    read_template,
    render_options,
)


def inspect(
    pool: PoolOption,
    student: StudentOption,
    base: BaseOption = None,
    record: Annotated[int, typer.Option(min=1, help="Which record of the pool, counted from 1.")] = 1,
    max_length: MaxLengthOption = 32768,
    span: SpanOption = Span.turn,
    render: RenderOption = Render.template,
    system: SystemOption = System.keep,
    chat_template: TemplateOption = None,
    last_turn_only: LastTurnOption = False,
    long: LongOption = Long.truncate,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Show a record as the student sees it, its scored tokens coloured."""
    from rich.console import Console

    from lark_fast.rendering.inspection import find_record, inspect_record
    from lark_fast.rendering.renderer import Renderer
    from lark_fast.student import load_config, load_tokenizer
    from lark_fast.student_files import find_student

    found = find_record(pool, record)
    files = find_student(student, base)
    config = load_config(files, trust_remote_code)
    renderer = Renderer(
        load_tokenizer(files, trust_remote_code),
        render_options(span, render, system, last_turn_only, long, max_length).fitting(
            getattr(config, "max_position_embeddings", None)
        ),
        vocab_size=config.vocab_size,
        chat_template=read_template(chat_template),
    )
    inspect_record(found, renderer, Console())


def demo(
    out: Annotated[
        Path, typer.Option(help="Directory for everything the demo makes; an earlier demo's is renewed.")
    ] = Path("lark-fast-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the problems, the student and the training.")] = 0,
) -> None:
    """The whole path on an embedded pool and a small student that it trains itself: on a CPU, in minutes."""
    from lark_fast.demo.run import run_demo

    run_demo(out, seed=seed)
