"""``lark-fast select``: scores and a policy make weights; the pool then streams past and leaves train.jsonl."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_fast.errors import UserError
from lark_fast.files import atomic_open, refuse_overlap, write_json, writing_to
from lark_fast.kernels.chi2 import DEFAULT_BUDGET
from lark_fast.pool.reading import Pool
from lark_fast.scoring.store import read_finished
from lark_fast.selection.config import SHOWN_PROBLEMS, SelectConfig, SelectionSummary, variants
from lark_fast.selection.first_pass import Seen, see_pool
from lark_fast.selection.leftovers import refuse_existing, remove_leftovers
from lark_fast.selection.matching import Matching, RowIndex
from lark_fast.selection.policies import PolicyOptions, find_policy
from lark_fast.selection.scored_rows import ScoredRows
from lark_fast.selection.sweep import as_markdown, comparison
from lark_fast.selection.weighing import Weighed, constrained, needed_columns, weigh
from lark_fast.selection.writing import TrainFiles, write_weights
from lark_fast.versions import versions

if TYPE_CHECKING:
    from lark_fast.selection.constrained import ConstrainedWeights
    from lark_fast.selection.constraints import Constraints

RACED_POLICIES = ("chi2", "topb")  # what looks at the best by g_hat alone

__all__ = ["SelectConfig", "SelectionSummary", "select", "sweep"]


def select(config: SelectConfig) -> SelectionSummary:
    """Choose and weight trajectories of a scored pool.

    Writes ``weights.parquet``, ``manifest.json`` and, when there is a pool, ``train.jsonl`` into ``out``. Every policy
    leaves out the trajectories without a g_hat, so that all of them choose from the same.

    Raises:
        UserError: a setting out of range; scores that are not finished or not finite; a pool that is not the scored
            one; a selection in ``out`` already and no ``overwrite``. ``out`` then is as it was.
    """
    if config.sweep:
        raise ValueError("a sweep makes more than one selection: call sweep")
    ((summary, _),) = _run(config).values()
    return summary


def sweep(config: SelectConfig) -> tuple[dict[str, SelectionSummary], str]:
    """Make a selection, as ``select`` does, in a directory of its own in ``out`` for each combination of a sweep.

    Returns:
        The summaries by the names of the directories, and the tables of ``comparison.md``; ``comparison.json`` has the
        same numbers.

    Raises:
        UserError: see ``select``.
    """
    found = _run(config)
    compared = comparison(
        {name: weighed for name, (_, weighed) in found.items()}, {name: summary for name, (summary, _) in found.items()}
    )
    tables = as_markdown(compared)
    with writing_to(config.out):
        write_json(Path(config.out) / "comparison.json", compared)
        with atomic_open(Path(config.out) / "comparison.md") as file:
            file.write(tables)
    return {name: summary for name, (summary, _) in found.items()}, tables


def _run(config: SelectConfig) -> dict[str, tuple[SelectionSummary, Weighed]]:
    """One reading of the scores, at most two of the pool, any number of selections."""
    asked = variants(config)
    directories = {name: Path(config.out, name) for name in asked}
    if Path(config.out).resolve().is_relative_to(Path(config.scores).resolve()):
        raise UserError(f"--out {config.out}: lies in --scores {config.scores}; give another directory")
    if not config.overwrite:
        refuse_existing(config, directories.values())
    pool = Pool(config.pool) if config.pool else None
    if pool is not None:
        refuse_overlap(config.out, {"--pool": pool.inputs, "--decontaminate": map(Path, config.decontaminate)})
    manifest = read_finished(config.scores)
    _refuse_beyond_race(manifest["identity"].get("race"), asked.values())
    constraints = None
    if config.constraints is not None:
        from lark_fast.selection.constraints import read_constraints

        constraints = read_constraints(config.constraints)
        if constraints.columns and pool is None:
            column = constraints.columns[0]
            raise UserError(f"--constraints {config.constraints}: {column} is a column of the pool: give --pool too")

    columns = [name for variant in asked.values() for name in needed_columns(variant.policy)]
    columns += ["nll", manifest["brier"]] if config.filters else []
    rows = ScoredRows(config.scores, tuple(dict.fromkeys(columns)))
    without_g_hat = int(np.count_nonzero(~np.isfinite(rows.numbers["g_hat"])))
    index = RowIndex(rows) if pool is not None else None
    with ExitStack() as stack:
        seen = see_pool(config, rows, index, pool, constraints.columns if constraints else (), manifest["brier"], stack)
        if seen.removed.gone.any() and np.isnan(rows.numbers["g_hat"]).all():
            counts = ", ".join(f"{name} took {count:,}" for name, count in seen.removed.counts.items())
            raise UserError(f"{counts}: nothing is left to select from")
        found = {name: _weigh(variant, rows, constraints, seen) for name, variant in asked.items()}
        selections = {directories[name]: weighed for name, (weighed, _) in found.items()}
        with writing_to(config.out):
            told, exported = _write(config, rows, index, pool, selections, seen)
            outcome = {}
            for name, variant in asked.items():
                weighed, solved = found[name]
                notes = seen.notes + (solved.lines if solved else ()) + exported.get(directories[name], ())
                facts = {"without_g_hat": without_g_hat, "removed": seen.removed.counts, "notes": notes} | told
                summary = _summary(directories[name], rows, weighed, facts)
                _write_manifest(directories[name] / "manifest.json", variant, manifest, summary, solved)
                outcome[name] = summary, weighed
        return outcome


def _refuse_beyond_race(race: dict[str, Any] | None, asked: Iterable[SelectConfig]) -> None:
    """Of a race, who comes first is known, and as many as it was for; the others' scores are forecasts.

    Raises:
        UserError: a selection asks for more than is known.
    """
    if race is None:
        return
    most = race["budget"]
    for variant in asked:
        told = variant.policy in RACED_POLICIES and variant.tau is None and (variant.budget or DEFAULT_BUDGET) <= most
        if not told or variant.filters or variant.constraints is not None:
            raise UserError(
                f"--scores {variant.scores}: were raced for the {most} best of each problem (score --race {most}), so "
                f"--policy {' or '.join(RACED_POLICIES)} with --budget {most} or less, without filters or constraints, "
                "is all they can tell; score without --race for more"
            )


def _weigh(
    variant: SelectConfig, rows: ScoredRows, constraints: "Constraints | None", seen: Seen
) -> tuple[Weighed, "ConstrainedWeights | None"]:
    """The weights of one selection, and how constraints bind, if there are any."""
    if constraints is None:
        options = PolicyOptions(
            budget=variant.budget, tau=variant.tau, ties=variant.ties, band=variant.band or _quartiles(rows, variant)
        )
        return weigh(rows, variant.policy, options, seed=variant.seed, teacher_order=variant.teacher_order), None
    return constrained(rows, constraints, seen.groups, budget=variant.budget, tau=variant.tau)


def _quartiles(rows: ScoredRows, variant: SelectConfig) -> tuple[float, float]:
    """The middle half of the pool's perplexities, for the policy that has a band."""
    if not find_policy(variant.policy).has_band:
        return 0.0, math.inf
    nll = rows.numbers["nll"][~np.isnan(rows.numbers["g_hat"])]
    return tuple(np.exp(np.quantile(nll, (0.25, 0.75))).tolist()) if len(nll) else (0.0, math.inf)


def _write(
    config: SelectConfig,
    rows: ScoredRows,
    index: RowIndex | None,
    pool: Pool | None,
    selections: Mapping[Path, Weighed],
    seen: Seen,
) -> tuple[dict[str, Any], dict[Path, tuple[str, ...]]]:
    """Write the selections but for their manifests; returns what the summaries say of the pool, and of exports."""
    told, notes = {"pool_records": 0, "never_scored": 0, "duplicates": 0, "columns_left_out": ()}, {}
    if index is not None and pool is not None:
        removed = (Path(config.out, "removed.jsonl"), seen.removed) if config.filters else None
        matching = Matching(index)
        with TrainFiles(rows, selections, config.export, removed) as files:
            for row, record in matching.pairs(pool, "selecting"):
                files.write(row, record)
            matching.refuse_another_pool()
            remove_leftovers(config, selections)
        told = {
            "pool_records": matching.records,
            "never_scored": matching.never_scored,
            "duplicates": matching.duplicates,
            "columns_left_out": tuple(sorted(files.columns_left_out)),
        }
        notes = {directory: files.notes(directory) for directory in selections}
    else:
        remove_leftovers(config, selections)
    write_weights(rows, selections)
    return told, notes


def _summary(out: Path, rows: ScoredRows, weighed: Weighed, facts: dict[str, Any]) -> SelectionSummary:
    first = weighed.empty_problems[:SHOWN_PROBLEMS]
    return SelectionSummary(
        out=str(out),
        problems=rows.n_problems,
        candidates=len(rows),
        rows=len(weighed.rows),
        problems_kept_whole=weighed.whole_problems,
        problems_without_row=len(weighed.empty_problems),
        first_problems_without_row=tuple(rows.problem_name(int(problem)) for problem in first),
        selected_tokens=int(rows.n_tokens[weighed.rows].sum()),
        mean_effective_sample_size=weighed.mean_effective_sample_size,
        mean_chi2_divergence=weighed.mean_chi2_divergence,
        teachers=_teacher_shares(rows, weighed),
        **facts,
    )


def _teacher_shares(rows: ScoredRows, weighed: Weighed) -> dict[str, dict[str, float]]:
    """Each teacher's share before (candidates) and after (rows, weight) the selection."""
    chosen = rows.teacher[weighed.rows]
    amounts = {"candidates": (rows.teacher, None), "rows": (chosen, None), "weight": (chosen, weighed.weight)}
    shares = {}
    for name, (teacher, weights) in amounts.items():
        of_teacher = np.bincount(teacher, weights=weights, minlength=len(rows.teachers))
        shares[name] = of_teacher / max(of_teacher.sum(), np.finfo(float).tiny)
    by_name = sorted(range(len(rows.teachers)), key=rows.teachers.__getitem__)
    return {rows.teachers[index]: {name: float(shares[name][index]) for name in amounts} for index in by_name}


def _how_solved(solved: "ConstrainedWeights") -> dict[str, Any]:
    facts = {name: getattr(solved, name) for name in ("multipliers", "tau", "solver", "residual")}
    return facts | {"tau": "infinite" if solved.tau == math.inf else solved.tau}


def _write_manifest(
    path: Path,
    config: SelectConfig,
    scores: dict[str, Any],
    summary: SelectionSummary,
    solved: "ConstrainedWeights | None",
) -> None:
    facts = asdict(summary)
    means = {name: facts.pop(name) for name in ("mean_effective_sample_size", "mean_chi2_divergence")}
    teachers, tokens, notes, _ = (facts.pop(name) for name in ("teachers", "selected_tokens", "notes", "out"))
    scores_manifest = Path(config.scores) / "manifest.json"
    shared_tau = config.tau if solved is None else solved.tau
    budget = DEFAULT_BUDGET if config.budget is None and shared_tau is None else config.budget
    write_json(
        path,
        {
            "config": asdict(config) | {"budget": budget, "sweep": ()},
            "scores": {
                "manifest_sha256": hashlib.sha256(scores_manifest.read_bytes()).hexdigest(),
                "brier": scores.get("brier"),
                "identity": scores.get("identity"),
            },
            "counts": facts,
            **means,
            "selected_tokens": tokens,
            "teachers": teachers,
            "constraints": solved and _how_solved(solved),
            "notes": notes,
            "versions": versions("numpy", "pyarrow"),
        },
    )
