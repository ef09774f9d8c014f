"""What came of a scoring run, for people and for machines."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lark_fast.flop import with_prefix
from lark_fast.pool.shares import Share
from lark_fast.progress import duration
from lark_fast.racing.outcome import RACE, RaceOutcome
from lark_fast.scoring.delta import DELTA, Delta
from lark_fast.scoring.estimate import ESTIMATED, Estimate
from lark_fast.scoring.head_summary import HEAD_SUMMARY, HeadSummary
from lark_fast.scoring.metrics import Account
from lark_fast.scoring.precision import FP8, Fp8Cost

SHOWN_REJECTS = 3
OF_PASSES = ("tokens_per_second", "ceiling_share", "device_busy_share", "writing_share", "padding_share")


def _of_account(name: str) -> property:
    """A field of the account, under its own name in the summary."""
    return property(
        lambda self: getattr(self.account, name), lambda self, value: setattr(self.account, name, value), doc=name
    )


@dataclass(slots=True, kw_only=True)
class ScoreSummary:
    """What came of a run; its counts are the account's."""

    out: str
    account: Account = field(default_factory=Account)
    ceiling: float = math.nan  # FLOP/s of the machine's best matrix product; NaN: not measured
    truncated: int = 0  # in this run
    first_rejects: list[str] = field(default_factory=list)  # the first SHOWN_REJECTS of them: file:line: reason
    rows: int = 0  # in the store
    problems: int | None = 0  # None: a share does not tell
    not_finite: int | None = 0
    complete: bool = False  # the pool has been read to its end (or to --limit), and the store, or share, is finished
    share: Share | None = None  # of the pool; None: all of it
    dry_run: bool = False  # nothing was written, and ``scored`` counts what could be scored
    estimate: Estimate | None = None  # of a dry run
    delta: Delta | None = None  # of two states of a student
    race: RaceOutcome | None = None
    sample: HeadSummary | None = None  # with --head-share
    fp8: Fp8Cost | None = None  # as measured in this run

    records = _of_account("records")
    scored = _of_account("scored")
    kept = _of_account("kept")
    rejected = _of_account("rejected")
    input_tokens = _of_account("input_tokens")
    scored_tokens = _of_account("scored_tokens")
    seconds = _of_account("seconds")

    @property
    def tokens_per_second(self) -> float:
        """Input tokens a second, rendering and writing included; 0 before there are any."""
        return self.input_tokens / self.seconds if self.seconds else 0.0

    def note_reject(self, where: str) -> None:
        """Count a record that cannot be used; ``where`` is file:line: reason."""
        self.rejected += 1
        if len(self.first_rejects) < SHOWN_REJECTS:
            self.first_rejects.append(where)

    def lines(self) -> list[str]:
        """For people; text of the pool is made harmless."""
        from lark_fast.rendering.inspection import visible

        lines = self._dry_lines() if self.dry_run else self._run_lines()
        if self.truncated:
            lines.append(f"{self.truncated:,} trajectories were longer than the maximum length and were cut")
        if self.rejected:
            where = "" if self.dry_run else f", listed in {Path(self.out) / 'rejected.jsonl'}"
            lines.append(f"{self.rejected:,} of {self.records:,} records rejected{where}")
            lines += [f"  {reject}" for reject in self.first_rejects]
        return [visible(line) for line in lines]

    def _dry_lines(self) -> list[str]:
        counted = (
            f"{self.scored:,} of {self.records:,} records can be scored: {self.input_tokens:,} tokens, "
            f"{self.scored_tokens:,} of them scored; nothing was written"
        )
        lines = [counted, *(self.estimate.lines() if self.estimate else [])]
        if 0 < self.account.head_tokens < self.scored_tokens:
            lines.insert(1, f"{self.account.head_tokens:,} of the scored tokens meet the head")
        if self.account.local_tokens:
            lines.insert(1, f"{self.account.local_tokens:,} tokens more pass through the student for local scores")
        if self.kept:
            lines.insert(1, f"{self.kept:,} trajectories have been scored before and would be kept")
        return lines

    def _run_lines(self) -> list[str]:
        elapsed = f"{self.seconds:.1f} s" if self.seconds < 120 else duration(self.seconds)
        lines = [
            f"{self.scored:,} trajectories scored ({self.input_tokens:,} tokens, {self.scored_tokens:,} scored) "
            f"in {elapsed}: {self.tokens_per_second:,.0f} tokens/s"
        ]
        if self.scored:
            table = self._table()
            width = max((len(name) for name, _ in table), default=0)
            lines += [f"  {name:<{width}}  {value}" for name, value in table]
        if self.kept:
            lines.append(f"{self.kept:,} trajectories had been scored before and were kept")
        if self.share is None:
            lines.append(f"{self.out}: {self.rows:,} trajectories of {self.problems:,} problems")
        else:
            others = f"`lark-fast merge` makes one store of all {self.share.of}"
            lines.append(f"{self.out}: {self.rows:,} trajectories, share {self.share}; {others}")
        if self.delta is not None:
            lines += self.delta.lines()
        if self.race is not None:
            lines += self.race.lines()
        if self.sample is not None:
            lines += self.sample.lines()
        if self.not_finite:
            lines.append(f"{self.not_finite:,} trajectories have no g_hat (statistics that are not finite, or nll 0)")
        return lines

    def _table(self) -> list[tuple[str, str]]:
        """Where the run's time went: (what, how much), without what is not known."""
        account = self.account
        share = account.ceiling_share(self.ceiling)
        rows = [
            ("forward passes", share, f"{share:.0%} of the matmul ceiling, {with_prefix(self.ceiling, 'FLOP/s')}"),
            (
                "device" if account.devices == 1 else f"{account.devices} devices",
                account.device_busy_share if account.device_seconds else math.nan,
                f"{account.device_busy_share:.0%} busy, waited {account.waiting_seconds:.1f} s for input",
            ),
            (
                "rendering",
                account.rendered_tokens_per_second,
                f"{account.rendered_tokens_per_second:,.0f} tokens/s a worker",
            ),
            ("writing", account.writing_share, f"{account.writing_share:.1%} of the time"),
            ("padding", account.padding_share, f"{account.padding_share:.1%} of what went through the student"),
        ]
        known = [(name, text) for name, value, text in rows if math.isfinite(value)]
        if self.fp8 is not None:
            known.insert(1, ("in FP8", self.fp8.brief()))
        if account.local_tokens:
            known.append(("local scores", f"{account.local_tokens:,} tokens more passed through the student"))
        if account.out_of_memory:
            times = "once" if account.out_of_memory == 1 else f"{account.out_of_memory:,} times"
            known.append(("memory", f"ran short {times}, and packs were made smaller"))
        if account.lost_processes:
            times = "once" if account.lost_processes == 1 else f"{account.lost_processes:,} times"
            known.append(("processes", f"lost {times}, and their passes done again"))
        return known

    def as_json(self) -> dict[str, Any]:
        """For machines: flat, the same keys after every run, None for what is not known.

        out, complete, dry_run                      of the run
        records, scored, kept, rejected, truncated  counts of records, see ``Account``; first_rejects: a list of the
                                                    first three, file:line: reason, as the pool has them
        rows, problems, not_finite                  what the store now holds; of a share the rows alone
        seconds, *_seconds, *_tokens, *_share, ...  the rest of ``Account.as_json``
        estimated_*                                 ``Estimate.as_json``, of a dry run
        paired_*                                    ``Delta.as_json``, of two states of a student
        race_*                                      ``RaceOutcome.as_json``, of a race
        sample_*                                    ``HeadSummary.as_json``, with --head-share
        fp8_*                                       ``Fp8Cost.in_summary``, of the sample that a run in FP8 begins with
        """
        unknown = {f"estimated_{name}": None for name in ESTIMATED}
        estimated = self.estimate.as_json() if self.estimate else unknown
        delta = self.delta.as_json() if self.delta else {f"paired_{name}": None for name in DELTA}
        race = self.race.as_json() if self.race else {f"race_{name}": None for name in RACE}
        sample = self.sample.as_json() if self.sample else {f"sample_{name}": None for name in HEAD_SUMMARY}
        fp8 = self.fp8.in_summary() if self.fp8 else {f"fp8_{name}": None for name in FP8}
        own = ("truncated", "first_rejects", "rows", "problems", "not_finite")
        run = {"out": self.out, "complete": self.complete, "dry_run": self.dry_run}
        account = self.account.as_json(self.ceiling)
        if self.dry_run:  # its seconds are those of rendering
            account |= dict.fromkeys(OF_PASSES)
        return run | account | {name: getattr(self, name) for name in own} | estimated | delta | race | sample | fp8
