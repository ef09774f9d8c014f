"""What a pilot says at its end: as JSON, as Markdown, in lines."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lark_fast.files import without_nan
from lark_fast.intervals import Interval, told
from lark_fast.pilot.measures import Measures
from lark_fast.pilot.runs import Run
from lark_fast.pilot.verdict import verdict
from lark_fast.pool.faults import rejected_line
from lark_fast.report.texts import short
from lark_fast.tables import escaped, table

_NLL = ("nll_before", "nll_after")  # of every held-out trajectory: runs.jsonl has them


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotSummary:
    """What came of it.

    Attributes:
        out: the directory.
        measured: the figures.
        runs: in the order of their seeds.
        facts: what was asked, and of what; see pilot.json.
    """

    out: str
    measured: Measures
    runs: tuple[Run, ...]
    facts: Mapping[str, Any]

    @property
    def verdict(self) -> list[str]:
        """Sentences."""
        names = ("trained_problems", "held_out_problems", "seeds", "steps", "budget", "take_all")
        return verdict(self.measured, **{name: self.facts[name] for name in names})

    def as_json(self) -> dict[str, Any]:
        """For programs; null stands for what nobody can say."""
        runs = [{name: value for name, value in run.as_json().items() if name not in _NLL} for run in self.runs]
        return without_nan({**self.facts, "verdict": self.verdict, **asdict(self.measured), "runs": runs})

    def lines(self) -> list[str]:
        """For people."""
        facts = self.facts
        rejected = [rejected_line(facts["rejected"], facts["first_reject"])] if facts["rejected"] else []
        return [
            *self.as_markdown().splitlines()[2:],
            *rejected,
            f"{self.out}: pilot.json, pilot.md, pilot.png, runs.jsonl",
        ]

    def as_markdown(self) -> str:
        """Tables, and the sentences."""
        facts, measured = self.facts, self.measured
        held_out = (
            f"{facts['measured_trajectories']:,} trajectories of {facts['held_out_problems']:,} other problems"
            + (f" where {', '.join(facts['held_out_where'])}" if facts["held_out_where"] else "")
        )
        head = (
            f"{facts['student']} on {', '.join(facts['pool'])}"
            + (f" where {', '.join(facts['where'])}" if facts["where"] else "")
            + f": {facts['trained_trajectories']:,} trajectories of {facts['trained_problems']:,} problems, budget "
            f"{facts['budget']}, about {facts['tokens']:,} input tokens a run ({facts['steps']} steps or more), "
            f"{facts['seeds']} seed(s), lr {facts['lr']:g}, "
            f"batches of {facts['global_batch']}. Held out: {held_out}; loss before training {measured.start:.4f}. "
            "Loss in nats a token; in brackets 95 % over seeds."
        )
        outcomes = [
            [
                one.contender,
                f"{one.rows:,}",
                f"{one.tokens:,.0f}",
                f"{one.epochs:.2f}",
                _told(one.loss, 4),
                _told(one.area, 4),
                _told(one.own_fall, 3),
            ]
            for one in measured.outcomes
        ]
        gaps = [
            [
                f"{gap.policy} - {gap.baseline}",
                told(gap.loss, 4),
                _bounds(gap.loss_over_seeds),
                _bounds(gap.loss_over_problems),
                told(gap.area, 4),
                _told(gap.own_fall, 3),
            ]
            for gap in measured.gaps
        ]
        parts = [
            "# Pilot\n",
            escaped(head) + "\n",
            *(f"- {escaped(sentence)}" for sentence in self.verdict),
            "\n## After training\n",
            table(
                ["trained on", "rows", "tokens", "epochs", "held-out loss", "the same along the run", "fall of own"],
                outcomes,
            ),
        ]
        if gaps:
            parts += [
                "## Differences (all together 95 %)\n",
                table(["", "held-out loss", "over seeds", "over problems", "along the run", "fall of own"], gaps),
                "Intervals are over seeds and problems together, of the loss along the run over seeds alone. Fall of "
                "own: -log(after / before) of the loss of what the policy itself selects of held-out problems.\n",
            ]
        if measured.worth is not None:
            worth = measured.worth
            lines = [[f"{rank:.2f}", told(gain, 4)] for rank, gain in zip(worth.ranks, worth.gains, strict=True)]
            parts += ["## What a rank of g_hat is worth\n", table(["rank", "gain in held-out loss"], lines)]
        shares = [one for one in measured.outcomes if one.teachers]
        teachers = sorted({name for one in shares for name in one.teachers})
        parts += [
            "## Share of the weight by teacher\n",
            table(
                ["trained on", *(short(name) or "(none)" for name in teachers)],
                [[one.contender, *(f"{one.teachers.get(name, 0):.1%}" for name in teachers)] for one in shares],
            ),
        ]
        return "\n".join(parts)


def _bounds(interval: Interval) -> str:
    return "" if math.isnan(interval.low) else f"{interval.low:.4f} to {interval.high:.4f}"


def _told(interval: Interval | None, digits: int) -> str:
    return "" if interval is None else told(interval, digits)
