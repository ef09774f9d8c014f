"""``lark-fast merge``."""

from typing import Annotated

import typer

from lark_fast.cli.options import Export, OverwriteOption, exit_if_nothing, say


def merge(
    shards: Annotated[list[str], typer.Argument(help="All that `lark-fast score --shard i/n --out` wrote, once each.")],
    out: Annotated[str, typer.Option(help="Directory of the scores; it may hold the shards' directories.")],
    overwrite: OverwriteOption = False,
    export: Annotated[Export | None, typer.Option(help="Also write the scores in this format.")] = None,
) -> None:
    """Make one store of the shards of a pool, as one run would have left it; the shards are only read."""
    from lark_fast.scoring.merging import MergeConfig
    from lark_fast.scoring.merging import merge as run

    summary = run(
        MergeConfig(shards=tuple(shards), out=out, overwrite=overwrite, export=None if export is None else export.value)
    )
    for line in summary.lines():
        say(line)
    exit_if_nothing(summary.rows)
