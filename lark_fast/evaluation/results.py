"""The files that an evaluation leaves: a line a problem, and the measures.

problems.jsonl   {benchmark, problem_id, kind, group, gold, answers: [{answer, correct, fault, tokens, finish}],
                  correct: [...], majority: {answer, correct}}
summary.json     {model, settings, benchmarks: {name: measures}}
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lark_fast.errors import UserError
from lark_fast.evaluation.backends.backend import Answer
from lark_fast.evaluation.benchmarks import Question
from lark_fast.evaluation.judging import Judged
from lark_fast.files import atomic_path, write_json

PROBLEMS, SUMMARY = "problems.jsonl", "summary.json"


def problem_line(question: Question, answers: Sequence[Answer], judged: Judged) -> dict[str, Any]:
    """A line of problems.jsonl."""
    return {
        "benchmark": question.benchmark,
        "problem_id": question.problem_id,
        "kind": question.kind,
        "group": question.group,
        "gold": question.answer,
        "answers": [
            {
                "answer": verdict.answer,
                "correct": verdict.correct,
                "fault": verdict.fault,
                "tokens": answer.tokens,
                "finish": answer.finish,
            }
            for answer, verdict in zip(answers, judged.verdicts, strict=True)
        ],
        "correct": [verdict.correct for verdict in judged.verdicts],
        "majority": {"answer": judged.majority.answer, "correct": judged.majority.correct},
    }


def write_results(directory: Path, lines: Iterable[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Write both files, the summary last: it says that the other is there."""
    with atomic_path(directory / PROBLEMS) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    write_json(directory / SUMMARY, _without_nan(summary))


def read_results(directory: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary, lines of problems.jsonl) of an evaluation.

    Raises:
        UserError: there is none, or a file cannot be read.
    """
    directory = Path(directory)
    for name in (SUMMARY, PROBLEMS):
        if not (directory / name).is_file():
            raise UserError(f"{directory}: no {name} there; give what `lark-fast eval --out` wrote, once it has ended")
    try:
        summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (directory / PROBLEMS).read_text(encoding="utf-8").splitlines()]
        if not all({"benchmark", "problem_id", "gold", "correct", "majority"} <= line.keys() for line in lines):
            raise ValueError("a line is not as it should be")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{directory}: its {SUMMARY} or {PROBLEMS} cannot be read: {error}; evaluate again") from error
    return summary, lines


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
