"""Markdown tables that are read as plain text too; nothing in a cell acts on either."""

import re
from collections.abc import Sequence

from lark_fast.rendering.inspection import visible

_MARKS = re.compile(r"[\\|<>`*\[\]&]|(?<!\w)_|_(?!\w)")  # an underscore inside a word means nothing


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up; cells are plain text, whatever they hold."""
    rows = [[escaped(cell).strip() for cell in row] for row in [header, *body]]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    ruler = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], ruler, *lines[1:]]) + "\n"


def escaped(text: str) -> str:
    """Text from elsewhere, as Markdown that shows it as it is."""
    return _MARKS.sub(lambda mark: "\\" + mark.group(), visible(text))
