"""The picture of a pilot: held-out loss by tokens, differences at the end, and what a rank of g_hat is worth."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lark_fast.pictures import new_figure, save_figure
from lark_fast.pilot.config import BUCKET
from lark_fast.pilot.summary import PilotSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, then others.
COLOURS = ("#d55e00", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#333333", "#56b4e9", "#8c6d31", "#7b4173", "#999999")


def draw_pilot(summary: PilotSummary, path: Path) -> bool:
    """Draw a PNG of 1500 x 550 pixels; False, and a line that says so, without matplotlib."""
    figure = new_figure(path, (15, 5.5))
    if figure is None:
        return False
    curves, gaps, worth = figure.subplots(1, 3, width_ratios=(4, 3, 3))
    names = [one.contender for one in summary.measured.outcomes if not one.contender.startswith(BUCKET)]
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    _draw_curves(curves, summary, colours)
    _draw_gaps(gaps, summary, colours)
    _draw_worth(worth, summary)
    save_figure(figure, path, (curves, gaps, worth))
    return True


def _draw_curves(axes: "Axes", summary: PilotSummary, colours: dict[str, str]) -> None:
    """A thin line a seed, and their mean."""
    for policy, colour in colours.items():
        curves = [np.array(run.held_out) for run in summary.runs if run.contender == policy and run.held_out]
        for curve in curves:
            axes.plot(curve[:, 0] / 1e3, curve[:, 1], color=colour, linewidth=0.8, alpha=0.4)
        if curves:
            shortest = min(map(len, curves))  # a run of a step less may lack a point
            tokens, loss = np.mean([curve[:shortest] for curve in curves], axis=0).T
            axes.plot(tokens / 1e3, loss, "o-", color=colour, linewidth=2.2, markersize=4, label=policy)
    axes.set(xlabel="thousand input tokens", ylabel="nats a token", title="Loss on held-out problems")
    if colours:
        axes.legend(frameon=False)


def _draw_gaps(axes: "Axes", summary: PilotSummary, colours: dict[str, str]) -> None:
    gaps = summary.measured.gaps
    for place, gap in enumerate(gaps):
        colour = colours[gap.policy]
        if math.isfinite(gap.loss.low):
            axes.plot([place] * 2, [gap.loss.low, gap.loss.high], color=colour, linewidth=2.5)
        axes.plot(place, gap.loss.mean, "D", color=colour, markersize=8, markeredgecolor="white")
    axes.axhline(0, color="#333333", linewidth=1)
    if not gaps:
        axes.text(0.5, 0.5, "nothing to compare", ha="center", transform=axes.transAxes)
    axes.set_xticks(range(len(gaps)), [gap.policy for gap in gaps])
    axes.set_xlim(-0.6, max(1, len(gaps)) - 0.4)
    baseline = gaps[0].baseline if gaps else "the baseline"
    axes.set(title=f"At the end, minus {baseline}", ylabel="nats a token; bars: 95 % together, over seeds and problems")


def _draw_worth(axes: "Axes", summary: PilotSummary) -> None:
    axes.set(title="What a rank of g_hat is worth", xlabel="rank within the problem, 1 the highest g_hat")
    axes.set_ylabel("gain in held-out loss, nats a token")
    axes.set_xlim(0, 1)
    worth = summary.measured.worth
    if worth is None:
        axes.text(0.5, 0.5, "no buckets", ha="center", transform=axes.transAxes)
        return
    for rank, gain in zip(worth.ranks, worth.gains, strict=True):
        if math.isfinite(gain.low):
            axes.plot([rank, rank], [gain.low, gain.high], color=COLOURS[2], linewidth=2)
    axes.plot(worth.ranks, [gain.mean for gain in worth.gains], "o", color=COLOURS[2], markersize=8)
