"""All answers of an evaluation are judged and measured. It takes seconds, so each run does it anew."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lark_fast.evaluation.backends.backend import Answer
from lark_fast.evaluation.benchmarks import Question
from lark_fast.evaluation.checker import Text
from lark_fast.evaluation.judging import Judge, Judged, Task
from lark_fast.evaluation.measures import Measures, measure
from lark_fast.evaluation.results import problem_line, write_results
from lark_fast.evaluation.store import EvalStore
from lark_fast.progress import track

Row = tuple[Question, list[Answer], Judged]


def judge_answers(
    store: EvalStore,
    questions: Sequence[Question],
    thinking: Mapping[tuple[str, str], bool],
    *,
    seconds: float,
    facts: Mapping[str, Any],
) -> dict[str, Measures]:
    """Judge what the store holds, and write problems.jsonl and summary.json.

    Args:
        store: with answers to all questions.
        questions: in the order of problems.jsonl.
        thinking: by (benchmark, problem_id): whether the prompt had opened the model's thoughts.
        seconds: of one answer's judgement.
        facts: what else summary.json says.

    Returns:
        The measures by benchmark.
    """
    rows = list(_judged(store, questions, thinking, seconds))
    measures = {}
    for name in dict.fromkeys(question.benchmark for question in questions):
        measures[name] = _measured([row for row in rows if row[0].benchmark == name])
    summary = {**facts, "benchmarks": {name: found.as_json() for name, found in measures.items()}}
    write_results(store.directory, (problem_line(*row) for row in rows), summary)
    return measures


def _judged(
    store: EvalStore, questions: Sequence[Question], thinking: Mapping[tuple[str, str], bool], seconds: float
) -> Iterator[Row]:
    answers = [store.answers(question) for question in questions]
    tasks = [
        Task(
            kind=question.kind,
            gold=question.answer,
            choices=question.choices,
            texts=tuple(
                Text(
                    text=answer.text,
                    thinking=thinking.get((question.benchmark, question.problem_id), False),
                    cut=answer.finish == "length",
                )
                for answer in given
            ),
        )
        for question, given in zip(questions, answers, strict=True)
    ]
    with Judge(seconds=seconds) as judge, track("judging", len(tasks)) as progress:
        for done, (question, given, judged) in enumerate(zip(questions, answers, judge.judge(tasks), strict=True), 1):
            yield question, given, judged
            progress.update(done, f"{done:,} of {len(tasks):,} problems")


def _measured(rows: Sequence[Row]) -> Measures:
    return measure(
        [[verdict.correct for verdict in judged.verdicts] for _, _, judged in rows],
        [judged.majority.correct for _, _, judged in rows],
        unanswered=[[vote is None for vote in judged.votes] for _, _, judged in rows],
        cut=[[answer.finish == "length" for answer in answers] for _, answers, _ in rows],
        tokens=[[answer.tokens for answer in answers] for _, answers, _ in rows],
        groups=[question.group for question, _, _ in rows],
    )
