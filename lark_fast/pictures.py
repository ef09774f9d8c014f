"""Pictures by matplotlib, where it is installed."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lark_fast.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(path: Path, size: tuple[float, float]) -> "Figure | None":
    """An empty figure of so many inches for a file; None, and a line that says so, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"lark-fast: {path.name} needs matplotlib: pip install 'lark-fast[plot]'", file=sys.stderr)
        return None
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: "Figure", path: Path, axes: Sequence["Axes"]) -> None:
    """Tidy the axes, and write a PNG of 100 dots an inch, whole or not at all."""
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.title.set_fontsize(13)
        one.grid(alpha=0.25)
        one.set_axisbelow(True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
