"""``lark-fast report``."""

from typing import Annotated

import typer

from lark_fast.cli.options import BaseOption, say


def report(
    scores: Annotated[str, typer.Option(help="What `lark-fast score --out` wrote.")],
    out: Annotated[str, typer.Option(help="The page, an .html file; figures go into a directory beside it.")],
    selection: Annotated[str | None, typer.Option(help="What `lark-fast select --out` wrote from them.")] = None,
    pool: Annotated[
        list[str] | None, typer.Option(help="What was scored (repeatable). Default: what the scores remember.")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(help="The student that was scored, to colour tokens. Default: what the scores remember."),
    ] = None,
    base: BaseOption = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="What `lark-fast train --out` wrote (repeatable).")
    ] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option("--eval", help="What `lark-fast eval --out` wrote (repeatable).")
    ] = None,
    problems: Annotated[int, typer.Option(help="How many problems can be opened one by one: at most 100.")] = 24,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page.")] = False,
) -> None:
    """One HTML page: what was scored, what was selected and why, and what came of it."""
    from lark_fast.report.run import ReportConfig, make_report

    summary = make_report(
        ReportConfig(
            scores=scores,
            out=out,
            selection=selection,
            pool=tuple(pool or ()),
            student=student,
            base=base,
            checkpoints=tuple(checkpoint or ()),
            evaluations=tuple(evaluation or ()),
            problems=problems,
            overwrite=overwrite,
        )
    )
    for line in summary.lines():
        say(line)
