"""Shows a record as the student sees it: its text, its tokens and which of them are scored."""

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from lark_fast.errors import RejectError, UserError
from lark_fast.pool.reading import Pool
from lark_fast.pool.records import NOT_SCORED, Record
from lark_fast.rendering.renderer import Rendered, Renderer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Control characters, format characters (bidirectional marks among them), surrogates, private use, line separators:
# all that could act on a terminal or hide in it.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_PROMPT_STYLE = "dim"
_SCORED_STYLES = ("black on bright_green", "black on bright_cyan")
_PART_OF_A_CHARACTER = "▫"


def visible(text: str, keep: str = "") -> str:
    """``text`` with every character that could act on a terminal, or cannot be seen, written as its escape code.

    Blanks other than the plain one count as invisible. Characters in ``keep`` stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if character in keep else _visible(character) for character in text)


def find_record(paths: Sequence[str], number: int) -> Record:
    """The ``number``-th record of a pool, counted from 1.

    Raises:
        UserError: the pool is shorter, or that record is no record.
    """
    position = 0
    for position, item in enumerate(Pool(paths).read(number), 1):
        if position == number:
            if isinstance(item, Record):
                return item
            raise UserError(f"{item.source}:{item.line}: {item.reason}")
    raise UserError(f"--record {number}: the pool has {position} records")


def inspect_record(record: Record, renderer: Renderer, console: "Console") -> None:
    """Print a record's rendering with its scored tokens marked, or the reason why it cannot be used.

    With colours, the prompt is dim and scored tokens have two backgrounds in turn, so that their borders show; without,
    lines in square brackets stand in front of each stretch of prompt and of scored text, and ``|`` between the scored
    tokens. Nothing in the record can move the cursor, change a colour or hide.
    """
    from rich.text import Text

    def show(line: "str | Text") -> None:
        console.print(Text(line) if isinstance(line, str) else line, soft_wrap=True)

    names = {"problem": record.problem_id, "candidate": record.candidate_id, "teacher": record.teacher}
    header = [f"{name} {visible(str(value))}" for name, value in names.items() if value != ""]
    if record.source:
        header.append(f"{visible(record.source)}:{record.line}")
    show(", ".join(header))
    try:
        rendered = renderer(record)
    except RejectError as error:
        show(f"rejected: {visible(str(error))}")
        return
    cut = ", truncated" if rendered.truncated else ""
    show(f"{len(rendered.input_ids)} tokens, {rendered.n_scored} of them scored{cut}")
    texts = pieces(rendered, renderer)
    if console.color_system is None or console.no_color:
        for line in _plain_lines(rendered, texts):
            show(line)
    else:
        show(_coloured(rendered, texts))


def pieces(rendered: Rendered, renderer: Renderer) -> list[str]:
    """The text of each token; they join to the text that was read, where there is a text."""
    ids = rendered.input_ids
    offsets = renderer.tokenise(rendered.text)[1] if rendered.text else None
    if offsets is None:
        return [renderer.tokenizer.decode([token]) for token in ids]
    pieces, behind = [], 0
    for _, end in offsets[: len(ids)]:
        # Blanks that offsets leave out go to the token behind them.
        pieces.append(rendered.text[behind:end])
        behind = max(behind, end)
    return pieces


def _stretches(rendered: Rendered) -> Iterator[tuple[bool, list[int]]]:
    """Runs of positions that are all scored or all not."""
    for scored, positions in groupby(range(len(rendered.labels)), lambda at: rendered.labels[at] != NOT_SCORED):
        yield scored, list(positions)


def _coloured(rendered: Rendered, pieces: list[str]) -> "Text":
    from rich.text import Text

    text = Text()
    for scored, positions in _stretches(rendered):
        if not scored:
            text.append("".join(_shown(pieces[position]) for position in positions), _PROMPT_STYLE)
            continue
        for position in positions:
            text.append(_shown(pieces[position]), _SCORED_STYLES[position % 2])
    return text


def _plain_lines(rendered: Rendered, pieces: list[str]) -> Iterator[str]:
    for scored, positions in _stretches(rendered):
        kind = "scored" if scored else "not scored"
        yield f"[{kind}: tokens {positions[0]} to {positions[-1]}]"
        text = ("|" if scored else "").join(_shown(pieces[position]) for position in positions)
        # Indented, so that no text can pass for one of the lines in brackets.
        for line in text.removesuffix("\n").split("\n"):
            yield f"    {line}"
    yield "[end]"


def _shown(piece: str) -> str:
    """A token's text with its line breaks both marked and made."""
    return visible(piece, keep="\n").replace("\n", "↵\n") or _PART_OF_A_CHARACTER


def _visible(character: str) -> str:
    if character == " ":
        return character
    category = unicodedata.category(character)
    if category not in _UNSAFE and category != "Zs":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
