"""The command line: arguments in, one call, a few lines out. Heavy imports wait until a command runs."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from lark_fast.rendering.renderer import RenderOptions

T = TypeVar("T")

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


class Span(StrEnum):
    """Which tokens of an assistant turn are scored."""

    turn = "turn"
    content = "content"


class Render(StrEnum):
    """How a conversation becomes text."""

    template = "template"
    raw = "raw"


class System(StrEnum):
    """What happens to a system message."""

    keep = "keep"
    merge = "merge"
    drop = "drop"


class Long(StrEnum):
    """What happens to a trajectory beyond the maximum length."""

    truncate = "truncate"
    reject = "reject"


class Ties(StrEnum):
    """How ties between candidates are treated."""

    exact = "exact"
    reference = "reference"


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


class Export(StrEnum):
    """Formats of other programs."""

    lark_json = "lark-json"


class NearDuplicates(StrEnum):
    """What counts as the same answer."""

    exact = "exact"
    minhash = "minhash"


PoolOption = Annotated[
    list[str],
    typer.Option(help="JSONL, JSON or Parquet (.gz, .zst too): a file, directory, glob or hub id. May be repeated."),
]
StudentOption = Annotated[str, typer.Option(help="Directory or Hugging Face id of the student.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Throw away what the output directory holds.")]
RemoteCodeOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")]
MaxLengthOption = Annotated[int, typer.Option(min=2, help="Tokens of a trajectory, prompt included.")]
SpanOption = Annotated[Span, typer.Option(help="Score to the end of the turn, or to the end of its content.")]
RenderOption = Annotated[
    Render, typer.Option(help="The chat template, or raw: generation prompt + content + end of turn.")
]
SystemOption = Annotated[System, typer.Option(help="Keep system messages, merge them into the user's, or drop them.")]
TemplateOption = Annotated[Path | None, typer.Option(help="A chat template to use instead of the tokenizer's.")]
LastTurnOption = Annotated[bool, typer.Option("--last-turn-only", help="Only the last assistant turn counts.")]
LongOption = Annotated[Long, typer.Option(help="What to do with trajectories beyond --max-length.")]


@app.command()
def score(
    pool: PoolOption,
    student: StudentOption,
    out: Annotated[str, typer.Option(help="Directory of the scores; the same command again goes on where it stopped.")],
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Brier score over the k largest logits (the paper: 50). Default: exact.")
    ] = None,
    max_length: MaxLengthOption = 32768,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
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
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N records.")] = None,
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

    config = ScoreConfig(
        pool=tuple(pool),
        student=student,
        out=out,
        top_k=top_k,
        dtype=dtype,
        device=device,
        options=_options(span, render, system, last_turn_only, long, max_length),
        chat_template=_template(chat_template),
        tokens_per_batch=_number_or_auto(tokens_per_batch, "--tokens-per-batch", at_least=1),
        workers=_number_or_auto(workers, "--workers", at_least=0),
        compile=compile,
        local_steps=local_steps,
        limit=limit,
        dry_run=dry_run,
        strict=strict,
        overwrite=overwrite,
        per_token=per_token,
        export=None if export is None else export.value,
        trust_remote_code=trust_remote_code,
    )
    summary = score_pool(config)
    if as_json:
        print(json.dumps(summary.as_json()))
    else:
        print("\n".join(summary.lines()), flush=True)
    if not (summary.scored or summary.kept):
        print("lark-fast: nothing could be scored", file=sys.stderr)
        raise typer.Exit(3)


@app.command()
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
            help="chi2, topb, kl, random, nll, local, perplexity, entropy, rsr, rho, brier, shortest, longest, "
            "teacher, or module:function."
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
            _say(line)
        said = {number: summary.lines()[1:] for number, summary in enumerate(summaries.values(), 1)}
        for line in dict.fromkeys(line for lines in said.values() for line in lines):
            where = [str(number) for number, lines in said.items() if line in lines]
            _say(line if len(where) == len(said) else f"{', '.join(where)}: {line}")
        _say(f"{out}: {len(summaries)} selection(s) side by side in comparison.md and comparison.json")
        if not any(summary.rows for summary in summaries.values()):
            raise typer.Exit(3)
        return
    summary = run(config)
    for line in summary.lines():
        _say(line)
    if not summary.rows:
        raise typer.Exit(3)


@app.command()
def train(
    data: Annotated[str, typer.Option(help="train.jsonl of a selection: messages and a weight each.")],
    student: StudentOption,
    out: Annotated[str, typer.Option(help="Directory of the checkpoint; the same command again goes on.")],
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
        recipe = recipe | {"lora": _checked(LoraOptions, **adapters)}
    given = {"epochs": epochs, "lr": lr, "global_batch": global_batch}
    recipe = recipe | {name: value for name, value in given.items() if value is not None}
    config = _checked(
        TrainConfig,
        data=data,
        student=student,
        out=out,
        eval_data=eval_data,
        eval_every=eval_every,
        patience=patience,
        probe=probe,
        **recipe,
        max_steps=max_steps,
        micro_batch=micro_batch,
        tokens_per_batch=_number_or_auto(tokens_per_batch, "--tokens-per-batch", at_least=1),
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
        options=_options(span, render, system, last_turn_only, Long.truncate, max_length),
        chat_template=_template(chat_template),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    for line in run(config).lines():
        _say(line)


@app.command()
def inspect(
    pool: PoolOption,
    student: StudentOption,
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

    found = find_record(pool, record)
    config = load_config(student, trust_remote_code)
    renderer = Renderer(
        load_tokenizer(student, trust_remote_code),
        _options(span, render, system, last_turn_only, long, max_length).fitting(
            getattr(config, "max_position_embeddings", None)
        ),
        vocab_size=config.vocab_size,
        chat_template=_template(chat_template),
    )
    inspect_record(found, renderer, Console())


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Directory for everything the demo makes; an earlier demo's is renewed.")
    ] = Path("lark-fast-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the problems, the student and the training.")] = 0,
) -> None:
    """The whole path on an embedded pool and a small student that it trains itself: on a CPU, in minutes."""
    from lark_fast.demo.run import run_demo

    run_demo(out, seed=seed)


def _options(
    span: Span, render: Render, system: System, last_turn_only: bool, long: Long, max_length: int
) -> "RenderOptions":
    from lark_fast.rendering.renderer import RenderOptions

    return RenderOptions(
        span=span.value,
        render=render.value,
        system=system.value,
        last_turn_only=last_turn_only,
        long=long.value,
        max_length=max_length,
    )


def _checked(kind: type[T], **values: Any) -> T:
    """Make a config; a value out of range is the user's to mend."""
    from lark_fast.errors import UserError

    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def _template(path: Path | None) -> str | None:
    from lark_fast.errors import UserError

    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {path}: cannot be read: {error}") from error


def _number_or_auto(text: str, option: str, *, at_least: int) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < at_least:
        raise typer.BadParameter(f"a whole number, at least {at_least}, or auto", param_hint=option)
    return int(text)


def _band(text: str | None) -> tuple[float, float] | None:
    from lark_fast.errors import UserError

    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise UserError(f"--band {text}: give two numbers, LOW:HIGH") from None
    return low, high


def _say(line: str) -> None:
    """Print a line whose text may come from a pool: nothing in it acts on the terminal."""
    from lark_fast.rendering.inspection import visible

    print(visible(line), flush=True)
