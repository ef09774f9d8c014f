"""The page's sections: which figures, tables and words, in which order. Each is there where its data are."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_fast.intervals import in_percent
from lark_fast.progress import duration
from lark_fast.ranks import rank_correlation
from lark_fast.report import charts
from lark_fast.report.measures import effective_sizes, weighted_mean, weighted_median
from lark_fast.report.texts import tails

if TYPE_CHECKING:
    import altair as alt

    from lark_fast.report.shown import Problem
    from lark_fast.report.sources import Scores, Selection

_MOST_LINES = 200  # of a table of groups
_MOST_REASONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart with what it says in words, for those who do not see it too."""

    name: str  # of its PNG
    title: str
    words: str
    chart: "alt.TopLevelMixin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text; the first column names the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    words: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    problems: "tuple[Problem, ...]" = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """All that a page is made of."""

    scores: "Scores"
    selection: "Selection | None" = None
    problems: "Sequence[Problem]" = ()
    training: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def sections(sources: Sources) -> Iterator[Section]:
    """The sections that there is something to say in."""
    builders: tuple[Callable[[Sources], Section | None], ...] = (
        _overview,
        _scores,
        _selection,
        _problems,
        _evaluation,
        _training,
        _left_out,
        _run,
    )
    for build in builders:
        section = build(sources)
        if section is not None:
            yield section


def _overview(sources: Sources) -> Section:
    scores, selection = sources.scores, sources.selection
    rows, counts = scores.rows, scores.manifest.get("counts") or {}
    facts = [
        ("Student", Path(str(scores.remembered("student") or "?")).name or "?"),
        ("Trajectories", f"{len(rows):,}"),
        ("Problems", f"{rows.n_problems:,}"),
        ("Candidates a problem", _range(np.bincount(rows.problem))),
        ("Teachers", f"{len(rows.teachers):,}"),
        ("Scored tokens", f"{int(rows.n_tokens.sum()):,}"),
        ("Rejected records", f"{counts.get('rejected', 0):,}"),
    ]
    words = []
    if selection is not None:
        chosen = selection.weight > 0
        config = selection.manifest.get("config") or {}
        size = selection.manifest.get("mean_effective_sample_size")
        facts += [
            ("Selected", f"{int(chosen.sum()):,} ({_share(chosen.mean())})"),
            ("Effective size a problem", _number(size)),
        ]
        before, after = float(np.mean(rows.n_tokens)), weighted_mean(rows.n_tokens, selection.weight)
        words.append(
            f"The policy {config.get('policy', '?')} chose {int(chosen.sum()):,} of {len(rows):,} trajectories. By "
            f"weight, a selected trajectory has {after:,.0f} scored tokens where the pool's have {before:,.0f}; "
            f"{_favoured(sources)}."
        )
    return Section(name="overview", title="At a glance", words=(*words, *sources.notes), facts=tuple(facts))


def _favoured(sources: Sources) -> str:
    """Which teacher gains most, in words."""
    groups, names = charts.grouped_teachers(sources.scores)
    before = np.bincount(groups, minlength=len(names)) / len(groups)
    after = np.bincount(groups, weights=sources.selection.weight, minlength=len(names))
    after = after / max(after.sum(), 1e-300)
    most, least = int(np.argmax(after - before)), int(np.argmin(after - before))
    if len(names) == 1 or after[most] - before[most] < 0.005:
        return "no teacher gains or loses half a point of the weight"
    return (
        f"{names[most]} gains most (from {_share(before[most])} of the candidates to {_share(after[most])} of the "
        f"weight), {names[least]} loses most (from {_share(before[least])} to {_share(after[least])})"
    )


def _scores(sources: Sources) -> Section:
    scores, selection = sources.scores, sources.selection
    g_hat, tokens = scores.column("g_hat"), scores.rows.n_tokens
    usable = np.isfinite(g_hat)
    together = Figure(
        name="rho-nll",
        title="rho against nll",
        words="A sample of the trajectories: how surprised the student is, and how much of that it can learn.",
        chart=charts.rho_against_nll(scores, selection),
    )
    kinds = (("g_hat", "g_hat"), ("rho", "rho"), ("nll", "nll, nats a token"), (scores.brier, "Brier score"))
    by_teacher, by_length = (
        [
            Figure(
                name=f"{column}-{what}".replace("_", "-"),
                title=f"{title.split(',')[0]} by {what}",
                words=words,
                chart=draw(scores, column, title),
            )
            for column, title in kinds
        ]
        for what, words, draw in (
            ("teacher", "5 to 95 % of a teacher's trajectories, middle half, and median.", charts.by_teacher),
            ("length", "Median and middle half of the trajectories of each length.", charts.by_length),
        )
    )
    figures = [together, by_length[0], *by_teacher, *by_length[1:]]
    words = []
    if usable.sum() > 2:
        bias = rank_correlation(g_hat[usable], tokens[usable])
        words.append(
            f"Over all trajectories, the rank correlation of g_hat with length is {bias:+.2f}: "
            + (
                "length hardly decides."
                if abs(bias) < 0.1
                else f"{'longer' if bias > 0 else 'shorter'} ones rank higher."
            )
        )
    if not usable.all():
        words.append(f"{int((~usable).sum()):,} trajectories have no g_hat.")
    return Section(name="scores", title="Scores", words=tuple(words), figures=tuple(figures))


def _selection(sources: Sources) -> Section | None:
    scores, selection = sources.scores, sources.selection
    if selection is None:
        return None
    weight = selection.weight
    sizes = effective_sizes(scores.rows, weight)
    figures = [
        Figure(
            name="teachers",
            title="Teachers before and after",
            words="Each teacher's share of the candidates, and of the selection's weight.",
            chart=charts.teacher_shares(scores, selection),
        ),
        Figure(
            name="lengths",
            title="Length before and after",
            words="The pool's trajectories, and the selection's by weight.",
            chart=charts.lengths(scores, selection),
        ),
    ]
    if len(sizes):
        figures += [
            Figure(
                name="weights",
                title="Weights",
                words="Of the selected trajectories; a problem's weights sum to 1.",
                chart=charts.histogram(weight[weight > 0], "weight", "trajectories"),
            ),
            Figure(
                name="effective-sizes",
                title="Effective size",
                words="1 / sum of squared weights of each problem: 1 is one trajectory, 3 are three of equal weight.",
                chart=charts.histogram(sizes, "effective size", "problems"),
            ),
        ]
    config = selection.manifest.get("config") or {}
    names = ("policy", "budget", "tau", "ties", "seed", "constraints", "where", "near_duplicates", "decontaminate")
    told = [(name, config[name]) for name in names if config.get(name) not in (None, "", [], ())]
    return Section(
        name="selection",
        title="What was selected",
        words=tuple(str(note) for note in selection.manifest.get("notes") or ()),
        figures=tuple(figures),
        tables=(
            Table(head=("setting", "value"), rows=tuple((name, _listed(value)) for name, value in told)),
            _before_after(sources),
        ),
    )


def _before_after(sources: Sources) -> Table:
    scores, weight = sources.scores, sources.selection.weight
    rows = []
    tokens = scores.rows.n_tokens
    values = {"scored tokens": tokens, "nll": scores.column("nll"), "rho": scores.column("rho")}
    for name, column in {**values, "g_hat": scores.column("g_hat")}.items():
        usable = np.isfinite(column)
        if usable.any():
            pool, selected = np.mean(column[usable]), weighted_mean(column[usable], weight[usable])
            rows.append((f"mean {name}", _number(float(pool)), _number(selected)))
    rows.insert(
        1, ("median scored tokens", *(_number(weighted_median(tokens, by)) for by in (np.ones(len(tokens)), weight)))
    )
    return Table(head=("", "pool", "selection, by weight"), rows=tuple(rows))


def _problems(sources: Sources) -> Section | None:
    if not sources.problems:
        return None
    words = [
        "Evenly spaced from the problem whose candidates differ most in g_hat to the one where they differ least. "
        "Open one to see its candidates, and a candidate to read it."
    ]
    if any(candidate.tokens for problem in sources.problems for candidate in problem.candidates):
        words.append("Colours show how surprised the student is by a token: the nll in nats.")
    return Section(name="problems", title="Problems", words=tuple(words), problems=tuple(sources.problems))


def _evaluation(sources: Sources) -> Section | None:
    if not sources.evaluations:
        return None
    rows, lines = [], []
    for run, (directory, summary) in zip(tails(list(sources.evaluations)), sources.evaluations.items(), strict=True):
        for benchmark, found in summary["benchmarks"].items():
            measures = {"ACC@1": "acc_1"}
            if found["n"] > 1:
                measures |= {f"ACC@{found['n']}": "acc_n", "majority": "majority"}
            for label, key in measures.items():
                rows.append({"run": run, "benchmark": benchmark, "measure": label, **found[key]})
            groups = {"": found, **found["groups"]}
            lines += [
                (
                    *(directory, f"{benchmark} {group}".strip(), f"{part['problems']:,}", str(part["n"])),
                    *(_interval(part[key]) for key in ("acc_1", "acc_n", "majority")),
                )
                for group, part in groups.items()
            ]
    return Section(
        name="evaluation",
        title="Evaluation",
        words=(f"{len(lines) - _MOST_LINES:,} more groups are not shown.",) if len(lines) > _MOST_LINES else (),
        figures=(
            Figure(
                name="accuracies",
                title="Problems solved",
                words="With 95 % intervals over problems.",
                chart=charts.accuracies(rows),
            ),
        ),
        tables=(
            Table(
                head=("run", "benchmark", "problems", "answers", "ACC@1", "ACC@n", "majority"),
                rows=tuple(lines[:_MOST_LINES]),
            ),
        ),
    )


def _training(sources: Sources) -> Section | None:
    figures = []
    for key, title, words in (
        ("loss", "Training loss", "sum w nll / sum w of each step."),
        ("eval_loss", "Held-out loss", "On trajectories that nobody trains on."),
        ("lr", "Learning rate", "Of each step."),
    ):
        series = {
            name: [(line["step"], line[key]) for line in lines if _finite(line.get(key))]
            for name, lines in zip(tails(list(sources.training)), sources.training.values(), strict=True)
        }
        series = {name: points for name, points in series.items() if points}
        if series:
            figures.append(
                Figure(
                    name=key.replace("_", "-"),
                    title=title,
                    words=words,
                    chart=charts.curves(series, "step", title.lower()),
                )
            )
    return Section(name="training", title="Training", figures=tuple(figures)) if figures else None


def _left_out(sources: Sources) -> Section:
    scores, selection = sources.scores, sources.selection
    rejects = scores.rejects
    words = [
        f"{scores.duplicates:,} trajectories are, token for token, an earlier candidate of their problem: they share "
        "its scores, and tie with it."
    ]
    tables = []
    if rejects.counts:
        tables.append(
            Table(
                head=("records that could not be scored", "number", "for example"),
                rows=tuple(
                    (reason, f"{count:,}", "\n".join(rejects.examples.get(reason, ())))
                    for reason, count in list(rejects.counts.items())[:_MOST_REASONS]
                ),
            )
        )
        if len(rejects.counts) > _MOST_REASONS:
            words.append(f"{len(rejects.counts) - _MOST_REASONS:,} more kinds of rejects are in rejected.jsonl.")
    else:
        words.append("No record was rejected.")
    if selection is not None and selection.removed:
        tables.append(
            Table(
                head=("trajectories that filters removed", "number"),
                rows=tuple((reason, f"{count:,}") for reason, count in selection.removed.items()),
            )
        )
    return Section(name="left-out", title="Left out", words=tuple(words), tables=tuple(tables))


def _run(sources: Sources) -> Section:
    scores = sources.scores
    timing, versions = scores.manifest.get("timing") or {}, scores.manifest.get("versions") or {}
    facts = []
    if _finite(timing.get("seconds")):
        facts.append(("Scoring took", duration(timing["seconds"])))
    if _finite(timing.get("tokens_per_second")):
        facts.append(("Tokens a second", f"{timing['tokens_per_second']:,.0f}"))
    if _finite(timing.get("ceiling_share")):
        facts.append(("Of the matmul ceiling", _share(timing["ceiling_share"])))
    if scores.log and isinstance(scores.log[-1].get("time"), str):
        facts.insert(0, ("Scored on", scores.log[-1]["time"][:10]))
    figures = []
    for key, name, title, words in (
        ("tokens_per_second", "throughput", "Tokens a second", "Of each run since its start, all waiting included."),
        ("device_busy_share", "busy", "How busy the device was", "Share of the time since the start of each run."),
    ):
        series = _by_run(scores.log, key)
        if max(map(len, series.values()), default=0) > 1:
            figures.append(
                Figure(name=name, title=title, words=words, chart=charts.curves(series, "seconds", title.lower()))
            )
    identity = scores.manifest["identity"]
    told = {**{f"{name} version": value for name, value in versions.items()}, **identity}
    table = Table(
        head=("what made the numbers", ""), rows=tuple((name, _listed(value)) for name, value in told.items())
    )
    return Section(name="run", title="The run", facts=tuple(facts), figures=tuple(figures), tables=(table,))


def _by_run(log: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    """(seconds, value) of every run of the scoring that went on where the one before was stopped."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in log:
        if _finite(line.get(key)) and _finite(line.get("seconds")):
            series.setdefault(f"run {line.get('run', 1)}", []).append((line["seconds"], line[key]))
    return series


def _range(counts: "np.ndarray") -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high:,}, median {np.median(counts):g}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "?" if not _finite(value) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _interval(found: Mapping[str, Any]) -> str:
    if not _finite(found.get("mean")):
        return "?"
    return in_percent(found["mean"], found["low"], found["high"]).replace(" (", " % (")


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
