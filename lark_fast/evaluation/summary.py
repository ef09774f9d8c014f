"""What an evaluation says at its end."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lark_fast.evaluation.measures import Measures
from lark_fast.intervals import Interval, in_percent
from lark_fast.progress import duration


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSummary:
    """What came of an evaluation.

    Attributes:
        model: that was evaluated, or the file its answers came from.
        measures: by benchmark.
        kept: problems whose answers an earlier run had made.
        tokens, seconds: written in this run, and the time that took.
    """

    out: str
    model: str
    measures: Mapping[str, Measures]
    kept: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "out": self.out,
            "model": self.model,
            "kept": self.kept,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "benchmarks": {name: found.as_json() for name, found in self.measures.items()},
        }

    def lines(self) -> list[str]:
        """For people."""
        said = [line for name, found in self.measures.items() for line in _lines(name, found)]
        wrote = f"{self.tokens:,} tokens in {duration(self.seconds)}" if self.tokens else "no new answers were needed"
        kept = f", the answers to {self.kept:,} problems kept" if self.kept and self.tokens else ""
        return [*said, f"{self.out}: {wrote}{kept}; problems.jsonl has the verdicts, generations.jsonl the texts"]


def share(interval: Interval) -> str:
    """ "12.0 % (4.0 to 22.0)"."""
    return in_percent(interval.mean, interval.low, interval.high).replace(" (", " % (")


def _lines(name: str, found: Measures) -> Iterator[str]:
    answers = "1 answer each" if found.n == 1 else f"{found.n} answers each"
    several = "" if found.n == 1 else f", ACC@{found.n} {share(found.acc_n)}, majority {share(found.majority)}"
    yield f"{name}: {found.problems:,} problem(s), {answers}: ACC@1 {share(found.acc_1)}{several}"
    for group, part in found.groups.items():
        yield f"  {group}: {part.problems:,} problem(s), ACC@1 {part.acc_1.mean:.1%}".replace("%", " %")
    if found.unanswered or found.cut:
        yield (
            f"  no answer found in {found.unanswered:.1%} of the answers; {found.cut:.1%} were cut at their longest"
        ).replace("%", " %")
