"""What the races of a store have spared, and what they got wrong where that is known."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from lark_fast.kernels.chi2 import TIE_SHARE_OF_SPREAD
from lark_fast.racing.rules import SHORTEST, RaceRules
from lark_fast.scoring.metrics import json_number
from lark_fast.scoring.parts import part_files, reading


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceOutcome:
    """Of all races of a store."""

    budget: int
    risk: float
    problems: int  # that were raced or audited
    stopped: int  # candidates that were not read in full, so that their scores are forecasts
    head_share: float  # of the store's scored tokens, those that the head read; less than ``share`` with a sample
    share: float  # of the store's scored tokens, those that were scored; audited problems in full
    share_of_races: float  # the same of raced problems alone
    audited: int  # problems
    wrong: int  # of these, those whose winners the race would have missed
    realised_low: float  # 95 % interval of the share of such problems; NaN where none was audited
    realised_high: float

    @property
    def realised(self) -> float:
        """The share of audited problems whose winners the race would have missed."""
        return self.wrong / self.audited if self.audited else math.nan

    def lines(self) -> list[str]:
        """For people."""
        if not self.problems:
            return [
                f"race: none was run; it takes more than {self.budget + 1} candidates a problem that differ, of "
                f"{SHORTEST} scored tokens or more in the mean, and not too long for the student to read them in pieces"
            ]
        read = f"; {self.head_share:.1%} met the head" if self.head_share < self.share else ""
        in_races = "" if math.isnan(self.share_of_races) else f" ({self.share_of_races:.1%} in those that were raced)"
        lines = [
            f"race for {self.budget}: {self.problems:,} problems, {self.share:.1%} of the scored tokens were scored"
            f"{in_races}, {self.stopped:,} candidates stopped{read}"
        ]
        if self.risk == 0:
            return [*lines, "risk 0: stopped by hard bounds alone"]
        if not self.audited:
            return [
                *lines,
                f"risk {self.risk:g}: no problem was drawn for the audit, so the realised risk is not known",
            ]
        lines.append(
            f"risk {self.risk:g} a problem: of {self.audited:,} scored in full the race would have missed winners of "
            f"{self.wrong:,} ({self.realised:.1%}, {self.realised_low:.1%} to {self.realised_high:.1%})"
        )
        if self.realised_low > self.risk:
            lines.append("the realised risk is above the one that was asked for: ask for less (--race-risk)")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Flat, by name; what is not known is None."""
        return {f"race_{name}": json_number(getattr(self, name)) for name in RACE}


RACE = (*(field.name for field in fields(RaceOutcome)), "realised")


def read_race(directory: str | Path, rules: RaceRules) -> RaceOutcome:
    """Sum up the races of a finished scores directory, some 50 bytes of memory a row.

    Raises:
        UserError: a part cannot be read.
    """
    names, tables = ["problem_id", "n_tokens", "n_raced", "winner", "audited", "g_hat"], []
    names += ["n_head"] if rules.head_share is not None else []
    for part in part_files(directory):
        with reading(part):
            tables.append(pq.read_table(part, columns=names, read_dictionary=names[:1]))
    empty = pa.table({name: [] for name in names})
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks() if tables else empty
    raced = np.asarray(table["winner"].is_valid()).astype(bool)
    winner = np.asarray(table["winner"].fill_null(False)).astype(bool) if tables else raced
    audited = np.asarray(table["audited"]).astype(bool)
    problem = table["problem_id"].combine_chunks().indices.to_numpy() if tables else np.zeros(0, np.int64)
    n_tokens, n_raced = (table[name].to_numpy().astype(np.float64) for name in ("n_tokens", "n_raced"))
    scored = np.where(audited, n_tokens, n_raced)
    read = scored if rules.head_share is None else table["n_head"].to_numpy().astype(np.float64)
    running = raced & ~audited
    missed = missed_winners(table["g_hat"].to_numpy()[audited], winner[audited], problem[audited])
    low, high = proportion_interval(int(missed.sum()), len(missed))
    return RaceOutcome(
        budget=rules.budget,
        risk=rules.risk,
        problems=len(np.unique(problem[raced])),
        stopped=int(np.count_nonzero(read < n_tokens)),
        head_share=_over(read.sum(), n_tokens.sum()),
        share=_over(scored.sum(), n_tokens.sum()),
        share_of_races=_over(scored[running].sum(), n_tokens[running].sum()),
        audited=len(missed),
        wrong=int(missed.sum()),
        realised_low=low,
        realised_high=high,
    )


def missed_winners(g_hat: ArrayLike, winner: ArrayLike, problem: ArrayLike) -> NDArray[np.bool_]:
    """Of each problem, whether somebody who is no winner is better than a winner.

    Args:
        g_hat: ``[N]`` of all candidates, exact; NaN is no candidate.
        winner: ``[N]`` whether the race has it among the winners.
        problem: ``[N]`` numbers, in any order.
    """
    g_hat, winner, problem = np.asarray(g_hat, np.float64), np.asarray(winner, bool), np.asarray(problem)
    valid = np.isfinite(g_hat)
    numbers, inverse = np.unique(problem, return_inverse=True)
    lowest, highest = np.full(len(numbers), np.inf), np.full(len(numbers), -np.inf)
    other = np.full(len(numbers), -np.inf)
    np.minimum.at(lowest, inverse[winner & valid], g_hat[winner & valid])
    np.maximum.at(highest, inverse[valid], g_hat[valid])
    np.maximum.at(other, inverse[~winner & valid], g_hat[~winner & valid])
    least = np.full(len(numbers), np.inf)
    np.minimum.at(least, inverse[valid], g_hat[valid])
    spread = np.where(np.isfinite(highest), highest - least, 0.0)
    return other > lowest + TIE_SHARE_OF_SPREAD * spread


def proportion_interval(count: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share by Wilson (1927), right also where ``count`` is 0; NaN where ``of`` is 0."""
    if not of:
        return math.nan, math.nan
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = count / of, 1 + z * z / of
    middle = (share + z * z / (2 * of)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def _over(amount: float, of: float) -> float:
    return float(amount / of) if of else math.nan
