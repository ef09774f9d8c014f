"""``lark-fast eval`` and ``lark-fast compare``."""

import json
from enum import StrEnum
from typing import Annotated

import typer

from lark_fast.cli.options import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    OverwriteOption,
    RemoteCodeOption,
    TemplateOption,
    checked,
    number_or_auto,
    read_template,
    say,
)


class Preset(StrEnum):
    """Published settings."""

    paper = "paper"


class Backend(StrEnum):
    """Programs that let a model answer."""

    auto = "auto"
    transformers = "transformers"
    vllm = "vllm"
    sglang = "sglang"


def evaluate(
    benchmark: Annotated[
        list[str], typer.Option(help="Problems with answers: JSONL, JSON, CSV or Parquet. May be repeated.")
    ],
    out: Annotated[str, typer.Option(help="Directory of the evaluation; the same command again goes on.")],
    model: Annotated[str | None, typer.Option(help="Directory or Hugging Face id; an adapter's directory too.")] = None,
    answers: Annotated[
        str | None, typer.Option(help="Answers made elsewhere (JSONL, JSON, Parquet), to judge in place of a model.")
    ] = None,
    base: BaseOption = None,
    preset: Annotated[
        Preset | None, typer.Option(help="paper: n 5, temperature 0.6, top-p 0.95, 12,288 new tokens.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Answers to each problem. Default: 1.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0, the default: the likeliest token always.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Share of the probability that is drawn from. Default: 1.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer. Default: 12,288.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    stop_at_answer: Annotated[
        bool,
        typer.Option(
            "--stop-at-answer/--no-stop-at-answer", help="End an answer behind its first box (Transformers only)."
        ),
    ] = True,
    backend: Annotated[Backend, typer.Option(help="auto: on a GPU vllm or sglang where installed.")] = Backend.auto,
    batch_size: Annotated[str, typer.Option(help="Answers written at a time, or auto: what fits.")] = "auto",
    instruction: Annotated[
        str | None, typer.Option(help='Put behind each question. Default: to reason and to box the answer; "": none.')
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message, where a question brings none.")] = None,
    chat_template: TemplateOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N problems of each benchmark.")] = None,
    judge_seconds: Annotated[
        float, typer.Option(min=0.1, help="An answer that takes longer to judge is wrong.")
    ] = 10.0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Sum up as one JSON object on stdout.")] = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Let a model answer benchmarks, judge the answers, and measure: ACC@1, ACC@n and majority vote."""
    from lark_fast.evaluation.config import PRESETS, EvalConfig, Sampling
    from lark_fast.evaluation.run import evaluate as run

    given = {"n": n, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    recipe = PRESETS[preset.value] if preset else {}
    recipe = recipe | {name: value for name, value in given.items() if value is not None}
    config = EvalConfig(
        model=model,
        benchmarks=tuple(benchmark),
        out=out,
        sampling=checked(Sampling, **recipe, seed=seed, stop_at_answer=stop_at_answer),
        answers=answers,
        base=base,
        backend=backend.value,
        device=device,
        dtype=dtype,
        batch_size=number_or_auto(batch_size, "--batch-size", at_least=1),
        system=system,
        instruction=instruction,
        chat_template=read_template(chat_template),
        limit=limit,
        judge_seconds=judge_seconds,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    summary = run(config)
    if as_json:
        print(json.dumps(summary.as_json()))
        return
    for line in summary.lines():
        say(line)


def compare(
    runs: Annotated[list[str], typer.Argument(help="What `lark-fast eval --out` wrote; the first is the baseline.")],
    out: Annotated[str, typer.Option(help="Directory of comparison.md, comparison.csv and comparison.json.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace these three files.")] = False,
) -> None:
    """Evaluations side by side, each with its difference from the first on the same problems."""
    from lark_fast.evaluation.comparison import compare as run

    for line in run(runs, out, overwrite=overwrite):
        say(line)
