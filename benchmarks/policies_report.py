"""What the runs of ``benchmarks.policies`` say: as numbers, as tables, in a sentence, and as a picture."""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from lark_fast.files import atomic_path

BASELINE = "random"
COLOURS = {"chi2": "#d55e00", "topb": "#e69f00", "random": "#0072b2", "full": "#333333"}  # Okabe and Ito's, and grey
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # two-sided, by degrees of freedom from 1 on
RESAMPLES = 10_000


def summaries(runs: list[dict[str, Any]], rows: list[tuple[str, str]]) -> dict[str, Any]:
    """Of each policy: its final losses, by teacher too, and what lies between it and the baseline."""
    nll, last = defaultdict(list), defaultdict(list)
    for run in runs:
        nll[run["policy"]].append(run["nll"])
        last[run["policy"]].append(run["held_out_loss"][-1][1])
    teachers = np.array([teacher for _, teacher in rows])
    _, problems = np.unique([problem for problem, _ in rows], return_inverse=True)
    found = {}
    for policy, losses in last.items():
        by_row = np.mean(nll[policy], axis=0)
        found[policy] = {
            "tokens": round(mean(run["tokens"] for run in runs if run["policy"] == policy)),
            "held_out_loss": round(mean(losses), 6),
            "deviation_over_seeds": round(stdev(losses), 6) if len(losses) > 1 else None,
            "by_teacher": {str(name): round(float(by_row[teachers == name].mean()), 4) for name in np.unique(teachers)},
        }
        if policy != BASELINE and BASELINE in last:
            gaps = [ours - theirs for ours, theirs in zip(losses, last[BASELINE], strict=True)]
            found[policy]["minus_random"] = {
                "mean": round(mean(gaps), 6),
                "by_seed": [round(gap, 6) for gap in gaps],
                "interval_over_seeds": _t_interval(gaps),
                "interval_over_problems": _bootstrap(by_row - np.mean(nll[BASELINE], axis=0), problems),
            }
    return found


def _t_interval(gaps: list[float]) -> list[float] | None:
    """95 %, of the mean of paired differences; None for a single one."""
    if len(gaps) < 2:
        return None
    half = T_95[min(len(gaps) - 1, len(T_95)) - 1] * stdev(gaps) / len(gaps) ** 0.5
    return [round(mean(gaps) - half, 6), round(mean(gaps) + half, 6)]


def _bootstrap(gaps: np.ndarray, problems: np.ndarray) -> list[float]:
    """95 %, of the mean of ``[T]`` differences, had other problems been held out: whole problems are drawn."""
    sums, counts = np.bincount(problems, weights=gaps), np.bincount(problems)
    draws = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    return [round(float(q), 6) for q in np.quantile(sums[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])]


def report(result: dict[str, Any]) -> str:
    """Two tables as Markdown, and what is to be made of them."""
    policies, selections = result["policy"], result["selections"]
    split, start = result["split"], result["runs"][0]["held_out_loss"][0][1]
    lines = [
        f"{result['student']} on {result['pool']}: {split['pool_trajectories']:,} trajectories of "
        f"{split['pool_problems']:,} problems, budget {result['budget']}, rate {result['lr']:g}, batches of "
        f"{result['global_batch']}, {result['dtype']}, {result['device']}. Held out: {split['held_out_trajectories']} "
        f"trajectories of {split['held_out_problems']} other problems, {split['held_out_are']}; loss before training "
        f"{start:.4f}.",
        "",
        "| policy | rows | tokens | epochs | held-out loss | minus random, 95 % over seeds | 95 % over problems |",
        "|---|---|---|---|---|---|---|",
    ]
    for policy, facts in policies.items():
        epochs = mean(run["epochs"] for run in result["runs"] if run["policy"] == policy)
        spread = facts["deviation_over_seeds"]
        loss = f"{facts['held_out_loss']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
        gap = facts.get("minus_random")
        cells = ["", ""]
        if gap is not None:
            over_seeds, over_problems = map(_interval, (gap["interval_over_seeds"], gap["interval_over_problems"]))
            cells = [f"{gap['mean']:+.4f} {over_seeds}", over_problems]
        lines.append(
            _row(policy, f"{selections[policy]['rows']:,}", f"{facts['tokens']:,}", f"{epochs:.2f}", loss, *cells)
        )
    teachers = list(next(iter(policies.values()))["by_teacher"])
    lines += ["", _row("held-out loss by teacher", *teachers), "|---" * (len(teachers) + 1) + "|"]
    lines += [
        _row(policy, *(f"{loss:.4f}" for loss in facts["by_teacher"].values())) for policy, facts in policies.items()
    ]
    names = sorted({name for facts in selections.values() for name in facts["teachers_by_weight"]})
    lines += [
        "",
        _row("share of the weight", *names, "correct answers", "scored tokens a row"),
        "|---" * (len(names) + 3) + "|",
    ]
    for policy, facts in selections.items():
        shares = [f"{facts['teachers_by_weight'].get(name, 0):.1%}" for name in names]
        right = f"{facts['correct_by_weight']:.1%}" if "correct_by_weight" in facts else ""
        lines.append(_row(policy, *shares, right, f"{facts['scored_tokens_a_row']:.1f}"))
    return "\n".join([*lines, "", verdict(policies)]) + "\n"


def verdict(policies: dict[str, Any]) -> str:
    """A policy differs from random where zero lies outside both intervals: over seeds, and over problems."""
    gaps = {policy: facts["minus_random"] for policy, facts in policies.items() if "minus_random" in facts}
    if not gaps:
        return f"Nothing was compared with {BASELINE}."
    if any(gap["interval_over_seeds"] is None for gap in gaps.values()):
        return "One seed tells nothing of chance: run more before believing an order."
    apart = {policy: gap["mean"] for policy, gap in gaps.items() if _outside(gap)}
    said = [
        f"{policy} ends {'below' if gap < 0 else 'above'} {BASELINE} by {abs(gap):.4f} nats a token"
        for policy, gap in apart.items()
    ]
    alike = [policy for policy in gaps if policy not in apart]
    if not apart:
        return f"Nothing separates the policies here: {', '.join(alike)} cannot be told from {BASELINE}."
    return "; ".join(said) + (f"; {', '.join(alike)} cannot be told from it." if alike else ".")


def _outside(gap: dict[str, Any]) -> bool:
    return all(low > 0 or high < 0 for low, high in (gap["interval_over_seeds"], gap["interval_over_problems"]))


def _interval(ends: list[float] | None) -> str:
    return "" if ends is None else f"[{ends[0]:+.4f}, {ends[1]:+.4f}]"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a PNG of 1200 x 500 pixels; without matplotlib, say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"policies: {path.name} needs matplotlib: pip install 'lark-fast[plot]'", file=sys.stderr)
        return
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_curves(left, result)
    _draw_gaps(right, result)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(13)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _draw_curves(axes: Any, result: dict[str, Any]) -> None:
    """A thin line a seed, and their mean."""
    for policy in result["policy"]:
        curves = [np.array(run["held_out_loss"]) for run in result["runs"] if run["policy"] == policy]
        for curve in curves:
            axes.plot(curve[:, 0] / 1e3, curve[:, 1], color=COLOURS[policy], linewidth=0.8, alpha=0.5)
        shortest = min(map(len, curves))  # a run of a step less may lack a point
        tokens, loss = np.mean([curve[:shortest] for curve in curves], axis=0).T
        axes.plot(tokens / 1e3, loss, "o-", color=COLOURS[policy], linewidth=2.5, markersize=5, label=policy)
    axes.set(xlabel="thousand input tokens", ylabel="nats a token", title="Loss on held-out problems")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=12)


def _draw_gaps(axes: Any, result: dict[str, Any]) -> None:
    gaps = {policy: facts["minus_random"] for policy, facts in result["policy"].items() if "minus_random" in facts}
    for place, (policy, gap) in enumerate(gaps.items()):
        colour = COLOURS[policy]
        if gap["interval_over_seeds"] is not None:
            axes.plot([place, place], gap["interval_over_seeds"], color=colour, linewidth=2)
        axes.plot([place] * len(gap["by_seed"]), gap["by_seed"], "o", color=colour, markersize=5, alpha=0.5)
        axes.plot(place, gap["mean"], "D", color=colour, markersize=9, markeredgecolor="white", zorder=3)
    axes.axhline(0, color=COLOURS[BASELINE], linewidth=1)
    axes.set_xticks(range(len(gaps)), list(gaps), fontsize=12)
    axes.set_xlim(-0.6, len(gaps) - 0.4)
    axes.set(title=f"At the end, minus {BASELINE}", ylabel="nats a token; bars: 95 % over seeds")
    axes.grid(axis="y", alpha=0.25)
