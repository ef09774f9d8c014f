"""The ``lark-fast`` program and its commands."""

from typing import Annotated

import typer

from lark_fast.cli.dropins import UNDERSCORES, rsr_metrics, score_lark
from lark_fast.cli.evaluation import compare, evaluate
from lark_fast.cli.evidence import diagnose, pilot
from lark_fast.cli.looking import demo, inspect
from lark_fast.cli.merging import merge
from lark_fast.cli.reporting import report
from lark_fast.cli.scoring import score
from lark_fast.cli.selection import select
from lark_fast.cli.training import train

app = typer.Typer(
    name="lark-fast",
    help="Score a pool of reasoning trajectories by how fast a student can learn them, select, and train.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from lark_fast import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command("eval")(evaluate)
for command in (score, merge, select, train, compare, report, diagnose, pilot, inspect, demo):
    app.command()(command)
for command in (score_lark, rsr_metrics):
    app.command(context_settings=UNDERSCORES)(command)
