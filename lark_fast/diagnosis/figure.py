"""The picture of a diagnosis: kappa by length, angles between gradients, agreement, and the pace of selections."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lark_fast.diagnosis.measures import Measures
from lark_fast.diagnosis.summary import DiagnoseSummary
from lark_fast.intervals import Interval, told
from lark_fast.pictures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#555555"  # of Okabe and Ito's


def draw_diagnosis(summary: DiagnoseSummary, path: Path) -> bool:
    """Draw a PNG of 1400 x 900 pixels; False, and a line that says so, without matplotlib."""
    figure = new_figure(path, (14, 9))
    if figure is None:
        return False
    (kappa, angles), (agreement, pace) = figure.subplots(2, 2)
    measured = summary.measured
    _draw_kappa(kappa, measured)
    _draw_angles(angles, measured)
    _draw_agreement(agreement, measured)
    _draw_pace(pace, measured)
    save_figure(figure, path, (kappa, angles, agreement, pace))
    return True


def _draw_kappa(axes: "Axes", measured: Measures) -> None:
    kappa = measured.kappa
    axes.set(title="kappa by length", xlabel="scored tokens", ylabel="|grad nll|² / Brier")
    if not kappa.values:
        return
    tokens, values = np.array(kappa.tokens, dtype=float), np.array(kappa.values)
    axes.loglog(tokens, values, "o", color=BLUE, markersize=4, alpha=0.5)
    if math.isfinite(kappa.slope.mean):
        ends = np.array([tokens.min(), tokens.max()])
        # The line of least squares goes through the mean of both logarithms.
        offset = np.log(values).mean() - kappa.slope.mean * np.log(tokens).mean()
        line = np.exp(offset) * ends**kappa.slope.mean
        axes.loglog(ends, line, color=ORANGE, linewidth=2, label=f"tokens^{told(kappa.slope)}")
        axes.legend(frameon=False)


def _draw_angles(axes: "Axes", measured: Measures) -> None:
    overlap = measured.overlap
    axes.set(title="Angles between gradients", xlabel="cosine", ylabel="share of the pairs")
    every = [*overlap.within, *overlap.across]
    if not every:
        return
    bins = np.linspace(min(0.0, *every), max(1e-3, *every), 41)
    for values, colour, label in (
        (overlap.within, BLUE, "two candidates of a problem"),
        (overlap.across, ORANGE, "trajectories of two problems"),
    ):
        if values:
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values, bins, weights=weights, color=colour, alpha=0.55, label=label)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.legend(frameon=False)


def _draw_agreement(axes: "Axes", measured: Measures) -> None:
    names = [f"{one.estimate} → {one.target}" for one in measured.agreements]
    axes.set(title="Rank correlation within problems, mean and 95 %", xlabel="Spearman")
    _draw_intervals(axes, names, [("", BLUE, [one.spearman for one in measured.agreements])])
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_xlim(-1.05, 1.05)


def _draw_pace(axes: "Axes", measured: Measures) -> None:
    axes.set(title="How fast a weighted loss falls", xlabel="times as fast, mean and 95 % over problems")
    series = [("exact R(q)", BLUE, [pace.exact for pace in measured.paces])]
    if not (measured.adamw.too_large or measured.adamw.too_small):
        series.append(("AdamW steps", ORANGE, [pace.adamw for pace in measured.paces]))
    _draw_intervals(axes, [f"{pace.policy} / {pace.beside}" for pace in measured.paces], series)
    axes.axvline(1, color=GREY, linewidth=1)
    if measured.paces:
        axes.legend(frameon=False)


def _draw_intervals(axes: "Axes", names: list[str], series: list[tuple[str, str, list[Interval]]]) -> None:
    """From the top down, a line a name."""
    for number, (label, colour, intervals) in enumerate(series):
        places = [-place - 0.18 * (number - (len(series) - 1) / 2) for place in range(len(names))]
        for place, interval in zip(places, intervals, strict=True):
            axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2)
        axes.plot([interval.mean for interval in intervals], places, "o", color=colour, markersize=6, label=label)
    axes.set_yticks([-place for place in range(len(names))], names)
