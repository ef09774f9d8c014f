"""Options that commands share, and what becomes of their values."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from lark_fast.rendering.renderer import RenderOptions

T = TypeVar("T")


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


class Export(StrEnum):
    """Formats of other programs that scores are written in."""

    lark_json = "lark-json"


PoolOption = Annotated[
    list[str],
    typer.Option(help="JSONL, JSON or Parquet (.gz, .zst too): a file, directory, glob or hub id. May be repeated."),
]
STUDENT_HELP = "Directory or Hugging Face id (org/name, org/name@revision) of the student or an adapter."
StudentOption = Annotated[str, typer.Option(help=STUDENT_HELP)]
BaseOption = Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")]
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


def render_options(
    span: Span, render: Render, system: System, last_turn_only: bool, long: Long, max_length: int
) -> "RenderOptions":
    """How conversations become tokens."""
    from lark_fast.rendering.renderer import RenderOptions

    return RenderOptions(
        span=span.value,
        render=render.value,
        system=system.value,
        last_turn_only=last_turn_only,
        long=long.value,
        max_length=max_length,
    )


def checked(kind: type[T], **values: Any) -> T:
    """Make a config; a value out of range is the user's to mend."""
    from lark_fast.errors import UserError

    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def read_template(path: Path | None) -> str | None:
    """The template in a file; None where no file was given."""
    from lark_fast.errors import UserError

    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {path}: cannot be read: {error}") from error


def number_or_auto(text: str, option: str, *, at_least: int) -> int | None:
    """A whole number, or None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < at_least:
        raise typer.BadParameter(f"a whole number, at least {at_least}, or auto", param_hint=option)
    return int(text)


def exit_if_nothing(scored: int) -> None:
    """Exit code 3 where nothing could be scored."""
    if not scored:
        print("lark-fast: nothing could be scored", file=sys.stderr)
        raise typer.Exit(3)


def say(line: str) -> None:
    """Print a line whose text may come from a pool: nothing in it acts on the terminal."""
    from lark_fast.rendering.inspection import visible

    print(visible(line), flush=True)
