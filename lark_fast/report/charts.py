"""The report's figures, as Altair charts of numbers that are already summed up: no chart holds a row a trajectory.

Names that come from a pool are values, never names of fields or parts of an expression.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
from numpy.typing import NDArray

from lark_fast.report.texts import labels

if TYPE_CHECKING:
    from lark_fast.report.sources import Scores, Selection

MOST_NAMES = 12
OTHERS = "others"
_POINTS = 1_500
_STEPS = 400  # points of a curve
_BINS = 40
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
POOL, SELECTED = "pool", "selected"
_TWO = alt.Scale(domain=[POOL, SELECTED], range=["#8a94a6", "#e4572e"])


def teacher_shares(scores: "Scores", selection: "Selection") -> alt.Chart:
    """Each teacher's share of the candidates, and of the weight."""
    groups, names = grouped_teachers(scores)
    shares = {POOL: np.bincount(groups, minlength=len(names)).astype(float)}
    shares[SELECTED] = np.bincount(groups, weights=selection.weight, minlength=len(names))
    values = [
        {"teacher": name, "what": what, "share": float(share[place] / max(share.sum(), 1e-300))}
        for what, share in shares.items()
        for place, name in enumerate(names)
    ]
    return (
        _chart(values, height=28 * len(names))
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            y=alt.Y("teacher:N", sort=names, title=None, axis=alt.Axis(labelLimit=170)),
            yOffset=alt.YOffset("what:N", sort=[POOL, SELECTED]),
            x=alt.X("share:Q", title="share of candidates, of weight", axis=alt.Axis(format="%")),
            color=alt.Color("what:N", scale=_TWO, legend=_legend()),
            tooltip=["teacher:N", "what:N", alt.Tooltip("share:Q", format=".1%")],
        )
    )


def by_teacher(scores: "Scores", column: str, title: str) -> alt.LayerChart:
    """A score's quantiles by teacher: 5 to 95 %, the middle half, the median."""
    groups, names = grouped_teachers(scores)
    values = scores.column(column)
    rows = []
    for place, name in enumerate(names):
        of_teacher = values[(groups == place) & np.isfinite(values)]
        if len(of_teacher):
            cut = np.quantile(of_teacher, _QUANTILES)
            rows.append(
                {"teacher": name, "count": len(of_teacher)}
                | dict(zip(("p5", "p25", "p50", "p75", "p95"), map(float, cut), strict=True))
            )
    base = _chart(rows, height=22 * max(1, len(rows))).encode(
        y=alt.Y("teacher:N", sort=names, title=None, axis=alt.Axis(labelLimit=170)),
        tooltip=["teacher:N", alt.Tooltip("count:Q", format=",")]
        + [alt.Tooltip(f"{name}:Q", format=".4g") for name in ("p5", "p25", "p50", "p75", "p95")],
    )
    scale = alt.Scale(zero=False)
    whole = base.mark_rule(color="#8a94a6").encode(x=alt.X("p5:Q", scale=scale, title=title), x2="p95:Q")
    middle = base.mark_bar(height=9, color="#4c78a8", opacity=0.75).encode(x=alt.X("p25:Q", scale=scale), x2="p75:Q")
    median = base.mark_tick(color="#e4572e", thickness=3, size=13).encode(x=alt.X("p50:Q", scale=scale))
    return whole + middle + median


def lengths(scores: "Scores", selection: "Selection | None") -> alt.Chart:
    """How long trajectories are: of the pool, and by weight of the selection."""
    tokens = np.maximum(scores.rows.n_tokens, 1).astype(float)
    edges = np.unique(np.geomspace(tokens.min(), tokens.max() + 1, _BINS + 1))
    values = _histogram(tokens, None, edges, POOL)
    if selection is not None and selection.weight.sum():
        values += _histogram(tokens, selection.weight, edges, SELECTED)
    return _steps(values, "scored tokens", scale=alt.Scale(type="log", nice=False))


def by_length(scores: "Scores", column: str, title: str) -> alt.LayerChart:
    """A score against length: the median and the middle half of twenty groups of equal size."""
    score, tokens = scores.column(column), np.maximum(scores.rows.n_tokens, 1)
    usable = np.flatnonzero(np.isfinite(score))
    values = []
    for part in np.array_split(usable[np.argsort(tokens[usable], kind="stable")], min(20, max(1, len(usable)))):
        if len(part):
            quarters = map(_short, np.quantile(score[part], (0.25, 0.5, 0.75)))
            values.append(
                {"tokens": float(np.median(tokens[part])), "count": len(part)}
                | dict(zip(("low", "median", "high"), quarters, strict=True))
            )
    base = _chart(values, height=240).encode(
        x=alt.X("tokens:Q", title="scored tokens", scale=alt.Scale(type="log", nice=False)),
        tooltip=[alt.Tooltip("tokens:Q", format=",.0f"), *_tooltips("low", "median", "high"), "count:Q"],
    )
    scale = alt.Scale(zero=False)
    band = base.mark_area(opacity=0.25, color="#4c78a8").encode(y=alt.Y("low:Q", scale=scale, title=title), y2="high:Q")
    line = base.mark_line(color="#4c78a8", point={"size": 30, "color": "#4c78a8"})
    return band + line.encode(y=alt.Y("median:Q", scale=scale))


def rho_against_nll(scores: "Scores", selection: "Selection | None") -> alt.Chart:
    """A sample of the trajectories."""
    nll, rho = scores.column("nll"), scores.column("rho")
    usable = np.flatnonzero(np.isfinite(nll) & np.isfinite(rho))
    if len(usable) > _POINTS:
        usable = np.sort(np.random.default_rng(0).choice(usable, _POINTS, replace=False))
    weight = np.zeros(len(nll)) if selection is None else selection.weight
    names = _labelled(scores.rows.teachers[teacher] for teacher in scores.rows.teacher[usable])
    values = [
        {
            "nll": _short(nll[row]),
            "rho": _short(rho[row]),
            "what": SELECTED if weight[row] > 0 else POOL,
            "teacher": names[scores.rows.teachers[scores.rows.teacher[row]]],
            "tokens": int(scores.rows.n_tokens[row]),
        }
        for row in usable
    ]
    return (
        _chart(values, height=280)
        .mark_circle(size=22, opacity=0.55)
        .encode(
            x=alt.X("nll:Q", title="nll, nats a token", scale=alt.Scale(zero=False)),
            y=alt.Y("rho:Q", title="rho = Brier / nll", scale=alt.Scale(zero=False)),
            color=alt.Color("what:N", scale=_TWO, legend=None if selection is None else _legend()),
            tooltip=["teacher:N", *_tooltips("nll", "rho"), "tokens:Q"],
        )
    )


def histogram(values: NDArray[np.float64], title: str, what: str) -> alt.Chart:
    """How often a number is how large; ``what`` there is a number of."""
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    counts, _ = np.histogram(values, edges)
    rows = [
        {"low": float(edges[place]), "high": float(edges[place + 1]), "count": int(count)}
        for place, count in enumerate(counts)
    ]
    return (
        _chart(rows)
        .mark_bar(color="#4c78a8")
        .encode(
            x=alt.X("low:Q", bin="binned", title=title, scale=alt.Scale(zero=False)),
            x2="high:Q",
            y=alt.Y("count:Q", title=what),
            tooltip=[*_tooltips("low", "high"), alt.Tooltip("count:Q", format=",")],
        )
    )


def curves(series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> alt.Chart:
    """Lines by name, a few hundred points each."""
    values = []
    for name, points in zip(labels(list(series)), series.values(), strict=True):
        kept = [points[int(place)] for place in np.unique(np.linspace(0, len(points) - 1, _STEPS).astype(int))]
        values += [{"name": name, "x": float(a), "y": _short(b)} for a, b in kept]
    return (
        _chart(values)
        .mark_line(strokeWidth=2, point=len(values) < 60)
        .encode(
            x=alt.X("x:Q", title=x),
            y=alt.Y("y:Q", title=y, scale=alt.Scale(zero=False)),
            color=alt.Color("name:N", sort=None, legend=_legend() if len(series) > 1 else None),
            tooltip=["name:N", alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=y, format=".4g")],
        )
    )


def accuracies(rows: Sequence[Mapping[str, Any]]) -> alt.LayerChart:
    """Shares with their intervals: rows of ``run``, ``benchmark``, ``measure``, ``mean``, ``low``, ``high``."""
    runs, benchmarks = _labelled(row["run"] for row in rows), _labelled(row["benchmark"] for row in rows)
    values = [
        {key: row[key] for key in ("mean", "low", "high")}
        | {"run": runs[row["run"]], "label": f"{benchmarks[row['benchmark']]}, {row['measure']}"}
        for row in rows
    ]
    places = list(dict.fromkeys(value["label"] for value in values))
    base = _chart(values, height=24 * max(1, len(values))).encode(
        y=alt.Y("label:N", sort=places, title=None, axis=alt.Axis(labelLimit=200)),
        yOffset=alt.YOffset("run:N", sort=None),
        color=alt.Color("run:N", sort=None, legend=_legend()),
        tooltip=["run:N", "label:N", *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("mean", "low", "high"))],
    )
    share = alt.X("low:Q", title="share of problems, 95 % interval", axis=alt.Axis(format="%"))
    return base.mark_rule(strokeWidth=2).encode(x=share, x2="high:Q") + base.mark_circle(size=70, opacity=1).encode(
        x="mean:Q"
    )


def grouped_teachers(scores: "Scores") -> tuple[NDArray[np.int64], list[str]]:
    """``[R]`` group numbers, and the groups' names: the most frequent teachers, and all others together."""
    counts = np.bincount(scores.rows.teacher, minlength=len(scores.rows.teachers))
    order = np.argsort(-counts, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    names = [scores.rows.teachers[teacher] for teacher in order[:MOST_NAMES]]
    if len(order) > MOST_NAMES:
        place = np.minimum(place, MOST_NAMES)
        names.append(f"{OTHERS} ({len(order) - MOST_NAMES:,})")
    return place[scores.rows.teacher], labels(names)


def _labelled(names: Iterable[str]) -> dict[str, str]:
    """The label of each name."""
    distinct = list(dict.fromkeys(names))
    return dict(zip(distinct, labels(distinct), strict=True))


def _chart(values: Sequence[Mapping[str, Any]], height: int = 220) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=list(values)), width="container", height=height)


def _steps(values: Sequence[Mapping[str, Any]], title: str, scale: alt.Scale) -> alt.Chart:
    return (
        _chart(values)
        .mark_area(interpolate="step-after", opacity=0.45, line=True)
        .encode(
            x=alt.X("low:Q", title=title, scale=scale),
            y=alt.Y("share:Q", title="share", stack=None, axis=alt.Axis(format="%")),
            color=alt.Color("what:N", scale=_TWO, legend=_legend()),
            tooltip=["what:N", *_tooltips("low", "high"), alt.Tooltip("share:Q", format=".1%")],
        )
    )


def _histogram(
    values: NDArray[np.float64], weights: NDArray[np.float64] | None, edges: NDArray[np.float64], what: str
) -> list[dict[str, Any]]:
    counts, _ = np.histogram(values, edges, weights=weights)
    shares = counts / max(float(counts.sum()), 1e-300)
    return [
        {"low": _short(edges[place]), "high": _short(edges[place + 1]), "share": _short(share), "what": what}
        for place, share in enumerate(shares)
    ]


def _legend() -> alt.Legend:
    return alt.Legend(title=None, orient="top", direction="horizontal", labelLimit=220, columns=2)


def _tooltips(*names: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{name}:Q", format=".4g") for name in names]


def _short(value: float) -> float:
    """A number with the digits that a figure shows."""
    return float(f"{value:.5g}")
