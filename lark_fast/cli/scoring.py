"""``lark-fast score``."""

import json
from enum import StrEnum
from typing import Annotated

import typer

from lark_fast.cli.options import (
    STUDENT_HELP,
    BaseOption,
    DeviceOption,
    DtypeOption,
    Export,
    LastTurnOption,
    Long,
    LongOption,
    MaxLengthOption,
    OverwriteOption,
    PoolOption,
    RemoteCodeOption,
    Render,
    RenderOption,
    Span,
    SpanOption,
    System,
    SystemOption,
    TemplateOption,
    exit_if_nothing,
    number_or_auto,
    read_template,
    render_options,
)
from lark_fast.racing.rules import DEFAULT_RISK, HIGHEST_RISK, RaceRules


class RaceBounds(StrEnum):
    """How the errors of a race's forecasts are bounded."""

    normal = "normal"
    bernstein = "bernstein"


class Engine(StrEnum):
    """What runs the student."""

    local = "local"
    ray = "ray"


class Precision(StrEnum):
    """What the student's layers multiply in, where it is not the student's dtype."""

    fp8 = "fp8"


def score(
    *,
    pool: PoolOption,
    student: Annotated[str | None, typer.Option(help=STUDENT_HELP)] = None,
    before: Annotated[
        str | None, typer.Option(help="Instead of --student, with --after: two states of a student are compared.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(help="The later of the two: loss_delta and rho_measured of each trajectory.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Between the two. Default: what --after says of itself, or 1.")
    ] = None,
    out: Annotated[str, typer.Option(help="Directory of the scores; the same command again goes on where it stopped.")],
    base: BaseOption = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Brier score over the k largest logits (the paper: 50). Default: exact.")
    ] = None,
    max_length: MaxLengthOption = 32768,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    precision: Annotated[
        Precision | None,
        typer.Option(help="fp8: the layers' products in FP8, on a GPU that has it; says what that costs on a sample."),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(help="One process a GPU: all, how many, or which (0,2). With --device cpu, how many processes."),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="Spread a student over GPUs, memory and disk: auto, balanced, sequential or a JSON file."),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="ray: as actors of a Ray cluster, --devices of them (default: one a GPU).")
    ] = Engine.local,
    ray_address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster. Default: the one of this machine, or one made for the run.")
    ] = None,
    span: SpanOption = Span.turn,
    render: RenderOption = Render.template,
    system: SystemOption = System.keep,
    chat_template: TemplateOption = None,
    last_turn_only: LastTurnOption = False,
    long: LongOption = Long.truncate,
    tokens_per_batch: Annotated[str, typer.Option(help="Tokens of one forward pass, or auto: what fits.")] = "auto",
    workers: Annotated[str, typer.Option(help="Processes that read and tokenise, or auto.")] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the student's layers first: faster on long runs.")
    ] = False,
    local_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Also score each step with only K preceding ones as context (LALP): local_nll."),
    ] = None,
    race: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Race for the N best candidates of each problem: those that cannot be among them are not scored to "
            "their end.",
        ),
    ] = None,
    race_risk: Annotated[
        float | None,
        typer.Option(help="Of stopping one of the best, a problem; audited. 0: hard bounds alone. Default: 0.05."),
    ] = None,
    race_bounds: Annotated[
        RaceBounds | None,
        typer.Option(help="How a race bounds its forecasts' errors: as normal ones, or by Bernstein's inequality."),
    ] = None,
    head_share: Annotated[
        float | None,
        typer.Option(
            help="Of each trajectory's scored positions, this share alone meets the head, with nll_se, ...; in a race "
            "of those who are running, and winners in full."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N records.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="i/n: share i of n of the pool, from 0/n (--array=0-7 in Slurm); then `lark-fast merge`."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what a run would take; write nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop with exit code 2 at the first reject.")] = False,
    overwrite: OverwriteOption = False,
    per_token: Annotated[bool, typer.Option("--per-token", help="Also store every token's statistics.")] = False,
    export: Annotated[Export | None, typer.Option(help="Also write the scores in this format.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Sum up as one JSON object on stdout.")] = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """One forward pass over every trajectory of a pool: nll, Brier score, entropy, rank, rho and g_hat."""
    from lark_fast.scoring.run import ScoreConfig, score_pool

    _refuse_mixed(student, before, after, steps, local_steps)
    config = ScoreConfig(
        pool=tuple(pool),
        student=student if before is None else before,
        out=out,
        after=after,
        steps=steps,
        base=base,
        top_k=top_k,
        dtype=dtype,
        device=device,
        devices=devices,
        precision=None if precision is None else precision.value,
        device_map=device_map,
        engine=engine.value,
        ray_address=ray_address,
        options=render_options(span, render, system, last_turn_only, long, max_length),
        chat_template=read_template(chat_template),
        tokens_per_batch=number_or_auto(tokens_per_batch, "--tokens-per-batch", at_least=1),
        workers=number_or_auto(workers, "--workers", at_least=0),
        compile=compile,
        race=_race_rules(race, race_risk, race_bounds, head_share),
        local_steps=local_steps,
        head_share=None if race is not None else head_share,
        limit=limit,
        shard=shard,
        dry_run=dry_run,
        strict=strict,
        overwrite=overwrite,
        per_token=per_token,
        export=None if export is None else export.value,
        trust_remote_code=trust_remote_code,
    )
    summary = score_pool(config)
    if summary is None:  # another rank has it
        return
    if as_json:
        print(json.dumps(summary.as_json()))
    else:
        print("\n".join(summary.lines()), flush=True)
    exit_if_nothing(summary.scored + summary.kept)


def _refuse_mixed(
    student: str | None, before: str | None, after: str | None, steps: int | None, local_steps: int | None
) -> None:
    """One student, or two states of one."""
    from lark_fast.errors import UserError

    if before is None and after is None:
        if student is None:
            raise UserError("--student is missing; or give two states of one, with --before and --after")
        if steps is not None:
            raise UserError("--steps lie between --before and --after, and there is one --student")
        return
    if student is not None:
        raise UserError("--student goes alone; --before and --after are the two states that are compared")
    if before is None or after is None:
        raise UserError(f"--{'before' if before is None else 'after'} is missing: two states of a student are compared")
    if local_steps is not None:
        raise UserError("--local-steps takes one --student; give it a run and a directory of its own")


def _race_rules(
    budget: int | None, risk: float | None, bounds: RaceBounds | None, head_share: float | None
) -> RaceRules | None:
    from lark_fast.errors import UserError

    if budget is None:
        for name, given in (("--race-risk", risk), ("--race-bounds", bounds)):
            if given is not None:
                raise UserError(f"{name} goes with --race")
        return None
    risk = DEFAULT_RISK if risk is None else risk
    if not 0 <= risk <= HIGHEST_RISK:
        raise UserError(f"--race-risk {risk:g}: lies between 0 and {HIGHEST_RISK:g}")
    if risk == 0 and bounds is not None:
        raise UserError(f"--race-bounds {bounds.value}: --race-risk 0 has bounds of its own; leave one of the two away")
    chosen = RaceBounds.normal if bounds is None else bounds
    return RaceRules(budget=budget, risk=risk, head_share=head_share, bounds=chosen.value)
