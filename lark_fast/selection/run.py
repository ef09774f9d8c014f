"""``lark-fast select``: scores and a policy make weights; the pool then streams past and leaves train.jsonl."""

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

import lark_fast
from lark_fast.errors import UserError
from lark_fast.files import atomic_open, refuse_overlap, write_json, writing_to
from lark_fast.kernels.chi2 import TIES
from lark_fast.pool.keys import KeyTable
from lark_fast.pool.reading import Pool, Rejected
from lark_fast.pool.records import Record
from lark_fast.progress import track
from lark_fast.scoring.store import read_manifest
from lark_fast.selection.policies import POLICIES, PolicyOptions
from lark_fast.selection.scored_rows import ScoredRows
from lark_fast.selection.weighing import Weighed, needed_columns, weigh

SHOWN_PROBLEMS = 3
_RESERVED_COLUMNS = frozenset({"messages", "input_ids", "labels", "weight", "meta"})
_RECORDS_AN_UPDATE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig:
    """What ``lark-fast select`` was asked to do."""

    scores: str
    pool: tuple[str, ...]
    out: str
    budget: int | None = None  # 3 when there is no tau either
    tau: float | None = None  # chi2 only, in the units of g_hat
    policy: str = "chi2"
    ties: str = "exact"  # or "reference", chi2 only
    seed: int = 0  # of the policy "random"
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionSummary:
    """What came of a run. Trajectories count once each, means are over the problems that have a row."""

    out: str
    problems: int
    candidates: int  # scored trajectories
    rows: int  # written
    without_g_hat: int  # scored trajectories that were dropped for it
    problems_kept_whole: int  # no more candidates than the budget
    problems_without_row: int
    first_problems_without_row: tuple[str, ...]
    pool_records: int
    never_scored: int  # pool records that are neither in the scores nor in rejected.jsonl
    duplicates: int  # pool records whose key came before
    columns_left_out: tuple[str, ...]  # unknown columns of the pool that bear a name the selection writes itself
    selected_tokens: int  # scored tokens of the rows
    mean_effective_sample_size: float
    mean_chi2_divergence: float  # from the uniform prior
    teachers: Mapping[str, Mapping[str, float]]  # share of the candidates, of the rows, of the weight

    def lines(self) -> list[str]:
        """The summary for a reader, a line a fact."""
        said = [
            f"{self.out}: {self.rows:,} of {self.candidates:,} trajectories for {self.problems:,} problems, "
            f"{self.selected_tokens:,} tokens, mean effective sample size {self.mean_effective_sample_size:.2f}"
        ]
        if self.without_g_hat:
            said.append(f"{self.without_g_hat:,} scored trajectories have no g_hat and were dropped")
        if self.problems_kept_whole:
            said.append(
                f"{self.problems_kept_whole:,} of {self.problems:,} problems have no more candidates than the budget: "
                "all of theirs are kept, alike"
            )
        if self.problems_without_row:
            names = ", ".join(map(repr, self.first_problems_without_row))
            more = ", ..." if self.problems_without_row > len(self.first_problems_without_row) else ""
            said.append(f"{self.problems_without_row:,} problems have no row, for want of any g_hat: {names}{more}")
        if self.never_scored:
            said.append(
                f"{self.never_scored:,} of {self.pool_records:,} pool records were never scored and were left out; "
                "`lark-fast score` would add them"
            )
        if self.duplicates:
            said.append(f"{self.duplicates:,} pool records repeat the key of an earlier one and were left out")
        if self.columns_left_out:
            said.append(f"pool columns left out, for the selection writes its own: {', '.join(self.columns_left_out)}")
        return said


def select(config: SelectConfig) -> SelectionSummary:
    """Choose and weight trajectories of a scored pool; writes ``train.jsonl`` and ``manifest.json`` into ``out``.

    Every policy leaves out the trajectories without a g_hat, so that all of them choose from the same.

    Raises:
        UserError: a setting out of range; scores that are not finished or not finite; a pool that is not the scored
            one; a selection in ``out`` already and no ``overwrite``. ``out`` then is as it was.
    """
    options = _checked_options(config)
    train = Path(config.out) / "train.jsonl"
    if train.exists() and not config.overwrite:
        raise UserError(f"--out {config.out}: holds a selection already; give another directory or --overwrite")
    pool = Pool(config.pool)
    refuse_overlap(config.out, {"--pool": pool.inputs})
    manifest = read_manifest(config.scores)
    if not manifest["complete"]:
        raise UserError(
            f"--scores {config.scores}: scoring was not finished; run the same `lark-fast score` command again"
        )

    rows = ScoredRows(config.scores, needed_columns(config.policy))
    weighed = weigh(rows, config.policy, options, config.seed)
    stream = _Stream(rows, weighed, _logged_rejects(Path(config.scores)))
    with writing_to(config.out):
        train.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(train) as file:
            stream.write(pool, file)
            stream.refuse_another_pool(config.scores)
            # From here on the old manifest, if any, would speak of another train.jsonl.
            (train.parent / "manifest.json").unlink(missing_ok=True)
        summary = _summary(config, rows, weighed, stream)
        _write_manifest(train.parent / "manifest.json", config, options, manifest, summary)
    return summary


def _checked_options(config: SelectConfig) -> PolicyOptions:
    """The policy's options, or a UserError for what does not go together."""
    if config.policy not in POLICIES:
        raise UserError(f"--policy {config.policy}: unknown; known are {', '.join(POLICIES)}")
    if config.ties not in TIES:
        raise UserError(f"--ties {config.ties}: unknown; known are {', '.join(TIES)}")
    if config.budget is not None and config.tau is not None:
        raise UserError("--budget and --tau: give one of them; a budget sets tau itself")
    if config.budget is not None and config.budget < 1:
        raise UserError(f"--budget {config.budget}: must be at least 1")
    if config.tau is not None and not (math.isfinite(config.tau) and config.tau > 0):
        raise UserError(f"--tau {config.tau}: must be a finite number above 0")
    if config.policy != "chi2" and config.tau is not None:
        raise UserError(f"--tau: only the policy chi2 has one; give --budget to {config.policy}")
    if config.ties == "reference" and (config.policy != "chi2" or config.tau is not None):
        raise UserError("--ties reference: is for the policy chi2 with a budget only")
    return PolicyOptions(budget=config.budget, tau=config.tau, ties=config.ties)


def _logged_rejects(scores: Path) -> KeyTable:
    """The (source, line) of every record that scoring rejected."""
    rejects = KeyTable()
    path = scores / "rejected.jsonl"
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                rejects.add((entry["source"], str(entry["line"])), b"", met=False)
    except FileNotFoundError:
        return rejects
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return rejects


class _Stream:
    """One pass over the pool: chosen records are written, and every scored one must be met."""

    def __init__(self, rows: ScoredRows, weighed: Weighed, rejects: KeyTable) -> None:
        self.rows, self.weighed, self.rejects = rows, weighed, rejects
        self.met = np.zeros(len(rows), dtype=bool)
        self.records = self.written = self.never_scored = self.duplicates = self.changed = 0
        self.first_changed = ""
        self.columns_left_out: set[str] = set()

    def write(self, pool: Pool, file: IO[str]) -> None:
        """Write a line for each chosen record, in the order of the pool."""
        with track("selecting", pool.total_bytes) as progress:
            for item in pool.read():
                self.records += 1
                row = self._row(item)
                if row is not None and self.weighed.chosen[row]:
                    file.write(json.dumps(self._line(item, row), ensure_ascii=False, allow_nan=False) + "\n")
                    self.written += 1
                if self.records % _RECORDS_AN_UPDATE == 0:
                    progress.update(pool.bytes_read, f"{self.records:,} records")
            progress.update(pool.bytes_read, f"{self.records:,} records")

    def refuse_another_pool(self, scores: str) -> None:
        """UserError when a scored trajectory was not met, or not with the text that was scored."""
        missing = np.flatnonzero(~self.met)
        if len(missing):
            problem, candidate, source = self.rows.locate(int(missing[0]))
            raise UserError(
                f"--pool: lacks {len(missing):,} of the {len(self.rows):,} trajectories in {scores}, first of all "
                f"problem {problem!r}, candidate {candidate!r} of {source}; give every --pool that was scored"
            )
        if self.changed:
            raise UserError(
                f"{self.first_changed}: not the text that was scored ({self.changed:,} of {len(self.rows):,} "
                f"trajectories in {scores} have changed); give the pool that was scored, in the same order"
            )

    def _row(self, item: Record | Rejected) -> int | None:
        """The row of the scores that this very record made, if it made one."""
        row = None if isinstance(item, Rejected) else self.rows.find(item.key)
        if row is None:
            self.never_scored += not self._was_rejected(item)
        elif self.met[row]:
            self.duplicates += 1
        elif self.rows.has_content(row, item.content_hash()):
            self.met[row] = True
            return row
        elif not self._was_rejected(item):
            self.met[row] = True
            self.changed += 1
            problem, candidate = item.key
            self.first_changed = self.first_changed or (
                f"{item.source}:{item.line}: problem {problem!r}, candidate {candidate!r}"
            )
        return None

    def _was_rejected(self, item: Record | Rejected) -> bool:
        return self.rejects.find((item.source, str(item.line))) is not None

    def _line(self, record: Record, row: int) -> dict[str, Any]:
        weight = float(self.weighed.weight[row])
        if record.messages is not None:
            line: dict[str, Any] = {"messages": record.messages}
        else:
            line = {"input_ids": record.input_ids, "labels": record.labels}
        line["weight"] = weight
        line["meta"] = {
            "problem_id": record.problem_id,
            "candidate_id": record.candidate_id,
            "teacher": record.teacher,
            "g_hat": float(self.rows.numbers["g_hat"][row]),
            "train_weight": weight,
        }
        self.columns_left_out |= record.extra.keys() & _RESERVED_COLUMNS
        return line | {name: value for name, value in record.extra.items() if name not in _RESERVED_COLUMNS}


def _summary(config: SelectConfig, rows: ScoredRows, weighed: Weighed, stream: _Stream) -> SelectionSummary:
    empty = weighed.empty_problems
    return SelectionSummary(
        out=config.out,
        problems=rows.n_problems,
        candidates=len(rows),
        rows=stream.written,
        without_g_hat=int(np.count_nonzero(~np.isfinite(rows.numbers["g_hat"]))),
        problems_kept_whole=weighed.whole_problems,
        problems_without_row=len(empty),
        first_problems_without_row=tuple(rows.problem_name(int(problem)) for problem in empty[:SHOWN_PROBLEMS]),
        pool_records=stream.records,
        never_scored=stream.never_scored,
        duplicates=stream.duplicates,
        columns_left_out=tuple(sorted(stream.columns_left_out)),
        selected_tokens=int(rows.n_tokens[weighed.chosen].sum()),
        mean_effective_sample_size=weighed.mean_effective_sample_size,
        mean_chi2_divergence=weighed.mean_chi2_divergence,
        teachers=_teacher_shares(rows, weighed),
    )


def _teacher_shares(rows: ScoredRows, weighed: Weighed) -> dict[str, dict[str, float]]:
    """Each teacher's share before (candidates) and after (rows, weight) the selection."""
    measures = {"candidates": np.ones(len(rows)), "rows": weighed.chosen, "weight": weighed.weight}
    shares = {}
    for name, amounts in measures.items():
        of_teacher = np.bincount(rows.teacher, weights=amounts, minlength=len(rows.teachers))
        shares[name] = of_teacher / of_teacher.sum()
    by_name = sorted(range(len(rows.teachers)), key=rows.teachers.__getitem__)
    return {rows.teachers[index]: {name: float(shares[name][index]) for name in measures} for index in by_name}


def _write_manifest(
    path: Path, config: SelectConfig, options: PolicyOptions, scores: dict[str, Any], summary: SelectionSummary
) -> None:
    facts = asdict(summary)
    means = {name: facts.pop(name) for name in ("mean_effective_sample_size", "mean_chi2_divergence")}
    teachers, tokens, _ = facts.pop("teachers"), facts.pop("selected_tokens"), facts.pop("out")
    scores_manifest = Path(config.scores) / "manifest.json"
    write_json(
        path,
        {
            "config": asdict(config) | {"budget": None if options.tau is not None else options.size},
            "scores": {
                "manifest_sha256": hashlib.sha256(scores_manifest.read_bytes()).hexdigest(),
                "brier": scores.get("brier"),
                "identity": scores.get("identity"),
            },
            "counts": facts,
            **means,
            "selected_tokens": tokens,
            "teachers": teachers,
            "versions": {
                "lark_fast": lark_fast.__version__,
                "numpy": np.__version__,
                "pyarrow": pa.__version__,
                "python": platform.python_version(),
            },
        },
    )
