"""Scores in the formats of other programs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lark_fast.files import atomic_open
from lark_fast.scoring.store import LARK_JSON, part_files, read_manifest


def export_lark_json(scores: str | Path) -> Path:
    """Write the scores as the JSON of LARK's released code, beside the parts; returns its path.

    ``Brier`` is the one that rho and g_hat are made of, as there; a g_hat that is not a number is written as NaN, as
    there. The whole table passes through memory.
    """
    manifest = read_manifest(scores)
    names = ["problem_id", "candidate_id", "teacher", "nll", manifest["brier"], "rho", "g_hat"]
    problems: dict[str, list[dict[str, Any]]] = {}
    for part in part_files(scores):
        table = pq.read_table(part, columns=names)
        for problem, candidate, teacher, nll, brier, rho, g_hat in zip(*table.to_pydict().values(), strict=True):
            row = {"candidate_id": candidate, "teacher": teacher, "L": nll, "Brier": brier, "rho": rho, "g_hat": g_hat}
            problems.setdefault(problem, []).append(row | {"candidate_id": _number(candidate)})
    counts, path = manifest["counts"], Path(scores) / LARK_JSON
    write_lark_json(
        path,
        student=manifest["config"]["student"],
        top_k=manifest["identity"]["top_k"],
        problems=dict(sorted(problems.items(), key=lambda item: _order(item[0]))),
        scored=counts["rows"],
        skipped=counts["rejected"],
    )
    return path


def write_lark_json(
    path: str | Path,
    *,
    student: str,
    top_k: int | None,
    problems: Mapping[str, Sequence[Mapping[str, Any]]],
    scored: int,
    skipped: int,
) -> None:
    """Write the file that LARK's released scorer writes, atomically.

    Args:
        path: where it will be.
        student: directory or id of the student.
        top_k: of the Brier score; None for the exact one, which the released scorer does not know.
        problems: rows of candidate_id, teacher, L, Brier, rho and g_hat by problem, in the order to be written. What is
            not a number is written as NaN, as there.
        scored: rows in all.
        skipped: records that could not be used.
    """
    made = {
        "method": "lark_ghat",
        "student_model": student,
        "top_k": top_k,
        "n_problems": len(problems),
        "n_scored": scored,
        "n_skipped": skipped,
        "scores": problems,
    }
    with atomic_open(path) as stream:
        json.dump(made, stream, ensure_ascii=False, indent=2)


def _number(name: str) -> int | str:
    """Ids that are decimal integers are integers in the reference's JSON."""
    return int(name) if name.removeprefix("-").isdecimal() and len(name) < 19 else name


def _order(problem: str) -> tuple[float, str]:
    number = _number(problem)
    return (number if isinstance(number, int) else math.inf, problem)
