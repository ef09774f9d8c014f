"""``lark-fast select``."""

from enum import StrEnum
from typing import Annotated

import typer

from lark_fast.cli.options import (
    OverwriteOption,
    say,
)


class Ties(StrEnum):
    """How ties between candidates are treated."""

    exact = "exact"
    reference = "reference"


class NearDuplicates(StrEnum):
    """What counts as the same answer."""

    exact = "exact"
    minhash = "minhash"


def select(
    scores: Annotated[str, typer.Option(help="What `lark-fast score --out` wrote.")],
    out: Annotated[str, typer.Option(help="Directory of the selection: train.jsonl, weights.parquet, manifest.json.")],
    pool: Annotated[
        list[str] | None, typer.Option(help="What was scored; may be repeated. Without it: weights.parquet only.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Candidates of a problem that get weight (kl: see README). Default: 3.")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="Strength of the penalty (chi2, kl) in units of g_hat, instead of a budget.")
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="chi2, topb, kl, random, nll, local, perplexity, entropy, rsr, rho, measured, brier, shortest, "
            "longest, teacher, or module:function."
        ),
    ] = "chi2",
    ties: Annotated[Ties, typer.Option(help="reference: ties as LARK's released code treats them.")] = Ties.exact,
    seed: Annotated[int, typer.Option(help="Of the policies random and perplexity.")] = 0,
    band: Annotated[
        str | None,
        typer.Option(help="LOW:HIGH, the perplexities of the policy perplexity. Default: the quartiles."),
    ] = None,
    teacher_order: Annotated[
        str | None, typer.Option(help="TEACHER,TEACHER,...: whom the policy teacher prefers, best first.")
    ] = None,
    constraints: Annotated[
        str | None, typer.Option(help="A YAML file of budgets and shares over all problems (docs/constraints.md).")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="COLUMN or COLUMN=VALUE: only records of which it is true (repeatable).")
    ] = None,
    near_duplicates: Annotated[
        NearDuplicates | None, typer.Option(help="Keep one of a problem's answers that are equal, or nearly so.")
    ] = None,
    near_duplicate_threshold: Annotated[
        float | None,
        typer.Option(help="Estimated Jaccard similarity at which minhash calls two the same. Default: 0.8."),
    ] = None,
    decontaminate: Annotated[
        list[str] | None, typer.Option(help="A benchmark's items: problems that share words with them go (repeatable).")
    ] = None,
    ngram: Annotated[
        int | None, typer.Option(help="Words in a row that --decontaminate looks for. Default: 13.")
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(help="Also write it for trl, llama-factory, axolotl, ... (docs/formats.md; repeatable)."),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="A selection for each combination of the KEY=VALUE,VALUE,... that follow.")
    ] = False,
    axes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE,...]...", help="For --sweep: budget, tau, policy, ties, seed.", show_default=False
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Choose a weighted subset of each problem's candidates; no forward pass."""
    from lark_fast.errors import UserError
    from lark_fast.selection.run import SelectConfig
    from lark_fast.selection.run import select as run
    from lark_fast.selection.run import sweep as run_sweep

    if sweep != bool(axes):
        raise UserError("--sweep and KEY=VALUE,VALUE,... (such as budget=1,2,3 policy=chi2,rsr): one needs the other")
    config = SelectConfig(
        scores=scores,
        pool=tuple(pool or ()),
        out=out,
        budget=budget,
        tau=tau,
        policy=policy,
        ties=ties.value,
        seed=seed,
        band=_band(band),
        teacher_order=tuple(name.strip() for name in teacher_order.split(",")) if teacher_order else (),
        constraints=constraints,
        where=tuple(where or ()),
        near_duplicates=None if near_duplicates is None else near_duplicates.value,
        near_duplicate_threshold=near_duplicate_threshold,
        decontaminate=tuple(decontaminate or ()),
        ngram=ngram,
        export=tuple(dict.fromkeys(export or ())),
        sweep=tuple(axes or ()),
        overwrite=overwrite,
    )
    if sweep:
        summaries, tables = run_sweep(config)
        for line in tables.splitlines():
            say(line)
        said = {number: summary.lines()[1:] for number, summary in enumerate(summaries.values(), 1)}
        for line in dict.fromkeys(line for lines in said.values() for line in lines):
            where = [str(number) for number, lines in said.items() if line in lines]
            say(line if len(where) == len(said) else f"{', '.join(where)}: {line}")
        say(f"{out}: {len(summaries)} selection(s) side by side in comparison.md and comparison.json")
        if not any(summary.rows for summary in summaries.values()):
            raise typer.Exit(3)
        return
    summary = run(config)
    for line in summary.lines():
        say(line)
    if not summary.rows:
        raise typer.Exit(3)


def _band(text: str | None) -> tuple[float, float] | None:
    from lark_fast.errors import UserError

    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise UserError(f"--band {text}: give two numbers, LOW:HIGH") from None
    return low, high
