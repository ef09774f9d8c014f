"""What a diagnosis says at its end: as JSON, as Markdown, in lines."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lark_fast.diagnosis.measures import Measures, Steps
from lark_fast.diagnosis.verdict import verdict
from lark_fast.files import without_nan
from lark_fast.intervals import Interval, told
from lark_fast.pool.faults import rejected_line
from lark_fast.progress import duration
from lark_fast.tables import escaped, table


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseSummary:
    """What came of it.

    Attributes:
        out: the directory.
        measured: the figures.
        facts: what was asked, and of what; see summary.json.
    """

    out: str
    measured: Measures
    facts: Mapping[str, Any]

    @property
    def verdict(self) -> list[str]:
        """Sentences."""
        return verdict(self.measured, lr=self.facts["lr"])

    def as_json(self) -> dict[str, Any]:
        """For programs; null stands for what nobody can say."""
        return without_nan({**self.facts, "verdict": self.verdict, **asdict(self.measured)})

    def lines(self) -> list[str]:
        """For people."""
        measured, facts = self.measured, self.facts
        said = [
            f"{measured.trajectories:,} trajectories of {measured.problems:,} problems, {measured.tokens:,} scored "
            f"tokens, gradients of {facts['n_parameters']:,} parameters ({facts['parameters']}), "
            f"{duration(facts['seconds'])}"
        ]
        if facts["rejected"]:
            said.append(rejected_line(facts["rejected"], facts["first_reject"]))
        return [*said, *self.verdict, f"{self.out}: summary.json, diagnosis.md, diagnosis.png, problems.jsonl"]

    def as_markdown(self) -> str:
        """Tables, and the sentences."""
        measured, facts = self.measured, self.facts
        kappa, overlap = measured.kappa, measured.overlap
        top_k = "the exact Brier score" if facts["top_k"] is None else f"the Brier score over {facts['top_k']} logits"
        head = (
            f"{facts['student']} on {', '.join(facts['pool'])}"
            + (f" where {', '.join(facts['where'])}" if facts["where"] else "")
            + f": {measured.trajectories:,} "
            f"trajectories of {measured.problems:,} problems, {measured.tokens:,} scored tokens, {top_k}; gradients of "
            f"{facts['n_parameters']:,} parameters ({facts['parameters']}) in {facts['dtype']}. In brackets: 95 % over "
            "problems."
        )
        assumptions = [
            ["kappa = |grad nll|^2 / Brier, median", _scientific(kappa.median)],
            ["its 90th percentile over its 10th", told(kappa.spread, 1)],
            ["largest over smallest of a problem, median", told(kappa.within, 1)],
            ["slope of log kappa by log tokens", told(kappa.slope)],
            ["variance of log kappa that this explains", told(kappa.explained)],
            ["90th over 10th percentile beside that line", told(kappa.spread_at_length, 1)],
            ["cosine of two candidates of a problem, mean", told(overlap.within_mean)],
            ["cosine of trajectories of two problems, mean", told(overlap.across_mean)],
            ["cross terms' share of |grad L|^2, all alike", told(overlap.share)],
        ]
        agreements = [
            [
                one.estimate,
                one.target,
                told(one.spearman),
                told(one.pearson),
                f"{told(one.top)}; {one.by_chance:.2f}" if math.isfinite(one.by_chance) else "",
                str(one.problems),
            ]
            for one in measured.agreements
        ]
        paces = [
            [
                *(pace.policy, pace.beside, told(pace.exact), told(pace.descent), told(pace.adamw)),
                str(pace.problems - pace.left_out),
            ]
            for pace in measured.paces
        ]
        steps = [
            ["descent, a step that should take 1 % off", *_told_steps(measured.descent, with_ratio=True)],
            [f"AdamW, {facts['steps']} steps at lr {facts['lr']:g}", *_told_steps(measured.adamw, with_ratio=False)],
        ]
        parts = [
            "# Diagnosis\n",
            escaped(head) + "\n",
            *(f"- {escaped(sentence)}" for sentence in self.verdict),
            "\n## The assumptions\n",
            table(["", ""], assumptions),
            "## Does one number order a problem's candidates as another does?\n",
            table(
                ["estimate", "target", "Spearman", "Pearson", f"best {facts['budget']} shared; by lot", "problems"],
                agreements,
            ),
            "## How many times as fast a weighted loss falls\n",
            table(["weights", "beside", "exact R(q)", "small descent step", "AdamW", "problems"], paces),
            "## The steps\n",
            table(["", "runs", "loss rose", "did not move", "measured / foretold rate, median"], steps),
        ]
        return "\n".join(parts)


def _told_steps(steps: Steps, *, with_ratio: bool) -> Iterator[str]:
    yield f"{steps.runs:,}"
    yield f"{steps.rose:,}"
    yield f"{steps.still:,}"
    yield told(steps.ratio) if with_ratio else ""


def _scientific(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.mean:.2e}"
    return f"{interval.mean:.2e} ({interval.low:.2e} to {interval.high:.2e})"
