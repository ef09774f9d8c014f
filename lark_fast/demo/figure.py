"""The demo's picture: how fast the loss of each selection falls, and what share of new problems is solved."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lark_fast.demo.result import Outcome, Result, share
from lark_fast.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#c8442c", "#4a6fa5", "#3a8f6b")  # of the policies, in their order
BEFORE = "#9a9a9a"


def draw_gain(result: Result, path: Path) -> bool:
    """Draw a PNG of 1200 x 500 pixels; False, and a line that says so, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"lark-fast: {path.name} needs matplotlib: pip install 'lark-fast[plot]'", file=sys.stderr)
        return False
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_losses(left, result)
    _draw_shares(right, result)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(13)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True


def _draw_losses(axes: "Axes", result: Result) -> None:
    """On a logarithmic axis, and from 1 on, the slope is the relative rate that the paper speaks of."""
    for outcome, colour in zip(result.outcomes, COLOURS, strict=False):
        steps, loss = _smooth(outcome)
        axes.plot(steps, loss / outcome.training[0], color=colour, linewidth=2, label=outcome.label)
        before, after = outcome.held_out
        axes.plot(outcome.steps, after / before, "o", color=colour, markersize=9, markeredgecolor="white", zorder=3)
    axes.plot([], [], "o", color=BEFORE, markersize=9, label="at the end, on held-out problems")
    axes.set_yscale("log")
    ticks = [1, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05]
    axes.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.minorticks_off()
    axes.set(
        xlabel="training step", ylabel="loss, of what it was before", title="How fast the loss of a selection falls"
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower left")


def _draw_shares(axes: "Axes", result: Result) -> None:
    bars = [("before", result.solved_before, BEFORE)]
    bars += [(o.policy, o.solved, colour) for o, colour in zip(result.outcomes, COLOURS, strict=False)]
    for place, (_, solved, colour) in enumerate(bars):
        mean, error = share(solved)
        axes.bar(place, mean, yerr=error, color=colour, width=0.65, capsize=5, error_kw={"elinewidth": 1.5})
        axes.annotate(
            f"{mean:.0%}", (place, mean + error), (0, 5), textcoords="offset points", ha="center", fontsize=12
        )
    axes.set_xticks(range(len(bars)), [name for name, _, _ in bars], fontsize=11)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set(title="New problems solved", ylabel=f"share of {len(result.solved_before)}, ± one standard error")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _smooth(outcome: Outcome) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Moving mean over a twentieth of the steps: a batch of 16 is noisy. Returns steps and losses."""
    window = max(1, outcome.steps // 20)
    loss = np.convolve(outcome.curve, np.full(window, 1 / window), mode="valid")
    return np.arange(len(loss)) + (window + 1) / 2, loss
