"""Evaluations side by side, and whether one differs from another on the same problems."""

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lark_fast.errors import UserError
from lark_fast.evaluation.measures import acc_at_k
from lark_fast.evaluation.results import read_results
from lark_fast.files import atomic_open, refuse_overlap, write_json, writing_to
from lark_fast.intervals import in_percent, paired_difference
from lark_fast.rendering.inspection import visible
from lark_fast.tables import escaped, table

_FILES = ("comparison.md", "comparison.csv", "comparison.json")
_COLUMNS = ("acc_1", "acc_n", "majority")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute


def compare(runs: Sequence[str], out: str, *, overwrite: bool = False) -> list[str]:
    """Make tables of several evaluations and, on the problems that both have, of their differences from the first.

    Writes ``comparison.md``, ``comparison.csv`` and ``comparison.json`` into ``out``.

    Args:
        runs: directories that ``lark-fast eval`` wrote, two or more.
        out: a directory.
        overwrite: replace the three files.

    Returns:
        What there is to say, a line a difference.

    Raises:
        UserError: a directory is no evaluation, no problem is shared, or one has two right answers.
    """
    if len(runs) < 2:
        raise UserError("compare: give two or more evaluations")
    if len({os.path.realpath(run) for run in runs}) < len(runs):
        raise UserError("compare: names an evaluation twice")
    # An evaluation's directory with a stranger's files in it would be refused when it is to go on.
    refuse_overlap(out, {"the evaluation": map(Path, runs)})
    there = [name for name in _FILES if (Path(out) / name).exists()]
    if there and not overwrite:
        raise UserError(f"--out {out}: has a {there[0]} already; --overwrite, or give another directory")
    found = {run: read_results(run) for run in runs}
    first = runs[0]
    differences = [difference for run in runs[1:] for difference in _differences(first, run, found)]
    rows = [row for run, (summary, _) in found.items() for row in _rows(run, summary)]
    cautions = [caution for run in runs[1:] for caution in _cautions(first, run, found)]
    with writing_to(out):
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(
            Path(out) / "comparison.json",
            {"baseline": first, "runs": rows, "differences": differences, "cautions": cautions},
        )
        with atomic_open(Path(out) / "comparison.csv") as file:
            file.write(_as_csv(rows))
        with atomic_open(Path(out) / "comparison.md") as file:
            file.write(_as_markdown(found, rows, differences, cautions))
    return [
        *map(_said, differences),
        *map(visible, cautions),
        f"{out}: comparison.md, comparison.csv and comparison.json",
    ]


def _rows(run: str, summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row a benchmark and a row a level or domain of it."""
    for benchmark, measures in summary["benchmarks"].items():
        for group, part in {"": measures, **measures["groups"]}.items():
            intervals = {
                f"{name}{suffix}": part[name][end]
                for name in _COLUMNS
                for end, suffix in (("mean", ""), ("low", "_low"), ("high", "_high"))
            }
            yield {
                "run": run,
                "model": summary["model"],
                "benchmark": benchmark,
                "group": group,
                "problems": part["problems"],
                "n": part["n"],
                **intervals,
                **{name: part[name] for name in ("unanswered", "cut", "tokens")},
            }


def _differences(first: str, run: str, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    theirs, ours = (_by_problem(found[name][1]) for name in (first, run))
    shared = [key for key in theirs if key in ours]
    if not shared:
        raise UserError(f"{run}: has no problem that {first} has too; compare evaluations of the same benchmark")
    for benchmark, problem in shared:
        golds = [lines[benchmark, problem]["gold"] for lines in (theirs, ours)]
        if golds[0] != golds[1]:
            raise UserError(
                f"{run}: problem {problem!r} of {benchmark} has the answer {golds[1]!r}, in {first} {golds[0]!r}"
            )
    for benchmark in dict.fromkeys(benchmark for benchmark, _ in shared):
        keys = [key for key in shared if key[0] == benchmark]
        left_out = sum(key[0] == benchmark for key in {**theirs, **ours}) - len(keys)
        sizes = {len(lines[key]["correct"]) for lines in (theirs, ours) for key in keys}
        # Any of eight answers against any of two would compare numbers, not models.
        k = min(sizes)
        measures = [("acc_1", _acc_at(1)), *([("acc_k", _acc_at(k))] if k > 1 else [])]
        for measure, value in [*measures, *([("majority", _majority)] if max(sizes) > 1 else [])]:
            paired = paired_difference([value(ours[key]) for key in keys], [value(theirs[key]) for key in keys])
            yield {
                "run": run,
                "baseline": first,
                "benchmark": benchmark,
                "measure": measure,
                "k": k,
                "left_out": left_out,
                **asdict(paired),
            }


def _cautions(first: str, run: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Settings in which a run differs from the first, so that the model is not all that differs."""
    theirs, ours = (found[name][0].get("settings", {}) for name in (first, run))
    differing = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if differing:
        told = ", ".join(f"{name} {ours.get(name)} instead of {theirs.get(name)}" for name in differing)
        yield f"{run} was not made as {first} was: {told}"


def _by_problem(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(line["benchmark"], line["problem_id"]): line for line in lines}


def _acc_at(k: int) -> Callable[[Mapping[str, Any]], float]:
    return lambda line: float(acc_at_k([line["correct"]], k)[0])


def _majority(line: Mapping[str, Any]) -> float:
    return float(line["majority"]["correct"])


def _said(difference: Mapping[str, Any]) -> str:
    gap = difference["difference"]
    verdict = "cannot be told from none" if gap["low"] <= 0 <= gap["high"] else "differs"
    left_out = f"; {difference['left_out']:,} that only one has left out" if difference["left_out"] else ""
    runs = f"{difference['run']} minus {difference['baseline']}"
    return (
        f"{visible(difference['benchmark'])}, {_title(difference['measure'], difference['k'])}: {visible(runs)}: "
        f"{100 * gap['mean']:+.1f} points ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}, "
        f"p = {difference['p_value']:.2g}) on {difference['problems']:,} problems: {verdict}{left_out}"
    )


def _title(measure: str, k: int = 0) -> str:
    return {"acc_1": "ACC@1", "acc_n": "ACC@n", "acc_k": f"ACC@{k}", "majority": "majority"}[measure]


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _no_formula(value) for key, value in row.items()})
    return text.getvalue()


def _no_formula(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return f"'{visible(value)}" if value.startswith(_FORMULA) else visible(value)


def _as_markdown(
    found: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    differences: Sequence[Mapping[str, Any]],
    cautions: Sequence[str],
) -> str:
    """A table a measure, runs down and benchmarks across, and the differences."""
    benchmarks = list(dict.fromkeys((row["benchmark"], row["group"]) for row in rows))
    cells = {(row["run"], row["benchmark"], row["group"]): row for row in rows}
    sizes = {row["n"] for row in rows}
    parts = ["# Evaluations\n"]
    for measure in _COLUMNS if max(sizes) > 1 else _COLUMNS[:1]:
        # Where runs have different n, their ACC@n are different measures: each says its own.
        told = measure != "acc_1" and len(sizes) > 1
        title = f"ACC@{max(sizes)}" if measure == "acc_n" and not told else _title(measure)
        head = ["run", *(f"{benchmark} {group}".strip() for benchmark, group in benchmarks)]
        lines = [[run, *(_cell(cells.get((run, *one)), measure, told) for one in benchmarks)] for run in found]
        parts += [f"## {title}, % (95 % interval over problems)\n", table(head, lines)]
    head = ["", "benchmark", "measure", "points", "95 % interval", "p", "problems"]
    lines = [
        [
            f"{one['run']} - {one['baseline']}",
            one["benchmark"],
            _title(one["measure"], one["k"]),
            f"{100 * one['difference']['mean']:+.1f}",
            f"{100 * one['difference']['low']:+.1f} to {100 * one['difference']['high']:+.1f}",
            f"{one['p_value']:.3g}",
            str(one["problems"]),
        ]
        for one in differences
    ]
    parts += [
        "## Differences on the same problems\n",
        table(head, lines),
        "Intervals are bootstrapped over problems, exact where all are alike; p is of a paired sign-flip test.\n",
        *(f"- {escaped(caution)}\n" for caution in cautions),
    ]
    return "\n".join(parts)


def _cell(row: Mapping[str, Any] | None, measure: str, with_n: bool) -> str:
    if row is None:
        return ""
    n = f", n {row['n']}" if with_n else ""
    return in_percent(*(row[f"{measure}{end}"] for end in ("", "_low", "_high"))) + n
