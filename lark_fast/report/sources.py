"""What the report is made of, read from the directories that score, select, train and eval wrote."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lark_fast.errors import UserError
from lark_fast.evaluation.results import SUMMARY, read_results
from lark_fast.racing.outcome import read_race
from lark_fast.racing.rules import RaceRules
from lark_fast.scoring.store import read_finished
from lark_fast.selection.first_pass import g_hat_of_the_rest
from lark_fast.selection.scored_rows import ScoredRows, key_hash, key_hashes

SHOWN_LINES = 3  # examples of a reason
_READ_LINES = 100_000  # of a log: more are counted, not looked into


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Weights on the rows of the scores.

    Attributes:
        weight: ``[R]``, 0 where a trajectory was not selected.
        g_hat: ``[R]``, of what filters left; NaN where they removed a trajectory.
        manifest: of the selection.
        removed: filters with the number of trajectories that they took out.
        removed_rows: the filter, by row.
    """

    directory: str
    weight: NDArray[np.float64]
    g_hat: NDArray[np.float64]
    manifest: dict[str, Any]
    removed: dict[str, int]
    removed_rows: dict[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasons:
    """Lines of a log by their reason."""

    counts: dict[str, int]
    examples: dict[str, list[str]]


class Scores:
    """A finished scores directory.

    Attributes:
        manifest: its manifest.
        brier: the name of the Brier score that rho and g_hat are made of.
        rows: nll, that score, rho and g_hat of every trajectory.

    Raises:
        UserError: there is none, or scoring was not finished.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.manifest = read_finished(directory)
        self.brier: str = self.manifest["brier"]
        self.rows = ScoredRows(directory, ("nll", self.brier, "rho", "g_hat"))

    def column(self, name: str) -> NDArray[np.float64]:
        """``[R]`` values of a column."""
        return self.rows.numbers[name]

    @cached_property
    def duplicates(self) -> int:
        """Trajectories with the tokens of an earlier candidate of their problem."""
        hashes = [batch["token_hash"] for batch in self.rows.batches("token_hash")]
        codes = pa.chunked_array(hashes).combine_chunks().dictionary_encode().indices.to_numpy()
        pairs = self.rows.problem.astype(np.int64) * (int(codes.max()) + 1) + codes
        return len(pairs) - len(np.unique(pairs))

    @cached_property
    def caveats(self) -> list[str]:
        """What has to be known of scores that are not all exact."""
        identity = self.manifest["identity"]
        race, share = identity.get("race"), identity.get("head_share")
        if race is not None:
            forecast = read_race(self.directory, RaceRules(**race)).stopped
            return [
                f"The scores are of a race for the {race['budget']} best of each problem: {forecast:,} of "
                f"{len(self.rows):,} trajectories were stopped early, and their nll, Brier score, rho and g_hat are "
                "forecasts."
            ]
        if share is not None:
            return [f"nll, Brier score, rho and g_hat are estimates, from a {share:g} share of the scored positions."]
        return []

    @cached_property
    def rejects(self) -> Reasons:
        """Records that could not be scored, by reason."""
        return _reasons(self.directory / "rejected.jsonl")

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return read_log(self.directory / "metrics.jsonl") if (self.directory / "metrics.jsonl").exists() else []

    def remembered(self, name: str) -> Any:
        """What the run was told: ``pool``, ``student`` or ``base``."""
        return (self.manifest.get("config") or {}).get(name)


def read_selection(directory: str, scores: Scores) -> Selection:
    """The weights of a selection, in the order of the scores.

    Raises:
        UserError: there is none, or it was made from other scores.
    """
    path = Path(directory)
    try:
        table = pq.read_table(path / "weights.parquet", columns=["problem_id", "candidate_id", "weight"])
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        identity = manifest["scores"]["identity"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--selection {directory}: is not what `lark-fast select --out` wrote ({reason}); of a sweep, give one of "
            "its directories"
        ) from error
    wanted = key_hashes(*(table[name].combine_chunks() for name in ("problem_id", "candidate_id")))
    order = np.argsort(scores.rows.keys)
    there = scores.rows.keys[order]
    place = np.minimum(np.searchsorted(there, wanted), len(there) - 1)
    if identity != scores.manifest["identity"] or not np.array_equal(there[place], wanted):
        raise UserError(f"--selection {directory}: was made from other scores than --scores {scores.directory}")
    weight = np.zeros(len(scores.rows))
    weight[order[place]] = table["weight"].to_numpy()
    removed = read_log(path / "removed.jsonl") if (path / "removed.jsonl").exists() else []
    by_key = {key_hash((str(one["problem_id"]), str(one["candidate_id"]))): one["reason"] for one in removed}
    keys = scores.rows.keys
    gone = np.isin(keys, np.fromiter(by_key, dtype=np.uint64, count=len(by_key)))
    removed_rows = {int(row): by_key[int(keys[row])] for row in np.flatnonzero(gone)}
    return Selection(
        directory=directory,
        weight=weight,
        g_hat=g_hat_of_the_rest(scores.rows, gone, scores.brier) if removed_rows else scores.column("g_hat"),
        manifest=manifest,
        removed=dict(Counter(by_key.values()).most_common()),
        removed_rows=removed_rows,
    )


def read_training(directory: str) -> list[dict[str, Any]]:
    """A line a step of a training run.

    Raises:
        UserError: there is no metrics.jsonl.
    """
    path = Path(directory) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"--checkpoint {directory}: no metrics.jsonl there; give what `lark-fast train --out` wrote")
    return read_log(path)


def read_evaluations(directories: Sequence[str]) -> dict[str, dict[str, Any]]:
    """summary.json by directory.

    Raises:
        UserError: there is none.
    """
    for directory in directories:
        if not (Path(directory) / SUMMARY).is_file():
            raise UserError(f"--eval {directory}: no {SUMMARY} there; give what `lark-fast eval --out` wrote")
    return {directory: read_results(directory)[0] for directory in directories}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; the last line may be half written.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _reasons(path: Path) -> Reasons:
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file):
                if number >= _READ_LINES:
                    counts["more, not looked into"] += 1
                    continue
                try:
                    entry = json.loads(line)
                    reason = str(entry.get("reason", "?"))
                except (ValueError, AttributeError) as error:
                    raise UserError(f"{path}:{number + 1}: cannot be read: {error}") from error
                kind = _kind(reason)
                counts[kind] += 1
                shown = examples.setdefault(kind, [])
                if len(shown) < SHOWN_LINES:
                    where = f"{entry.get('source', entry.get('problem_id', ''))}:{entry.get('line', '')}"
                    shown.append(f"{where.rstrip(':')}: {reason}")
    return Reasons(counts=dict(counts.most_common()), examples=examples)


def _kind(reason: str) -> str:
    """A reason without what differs from record to record: numbers and what is quoted."""
    return re.sub(r"\d[\d,.]*", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "...", reason))[:120]
