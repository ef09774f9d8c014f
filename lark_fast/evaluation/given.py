"""Answers that were made elsewhere, to be judged as they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lark_fast.errors import UserError
from lark_fast.evaluation.backends.backend import Answer
from lark_fast.evaluation.benchmarks import Question
from lark_fast.pool.objects import read_objects

_TEXTS = ("text", "response", "completion", "output", "generation", "answer")
_LISTS = ("answers", "generations", "outputs", "responses")
_IDS = ("problem_id", "id")


def read_answers(path: str, questions: Sequence[Question]) -> dict[tuple[str, str], list[Answer]]:
    """Read a file of answers (JSONL, a JSON list or Parquet), one or several to a problem.

    A line has ``problem_id`` (and ``benchmark`` where several are evaluated), and what was answered: ``text`` (or
    response, completion, output, generation, answer), or a list of them in ``answers``, or ``messages`` that end with
    the assistant's. Lines of one problem add up.

    Returns:
        By (benchmark, problem_id); every problem with as many answers.

    Raises:
        UserError: the file cannot be read, names no known problem, or problems differ in how many answers they have.
    """
    benchmarks = list(dict.fromkeys(question.benchmark for question in questions))
    known = {(question.benchmark, question.problem_id) for question in questions}
    found: dict[tuple[str, str], list[Answer]] = {}
    if not Path(path).is_file():
        raise UserError(f"--answers {path}: there is no such file")
    for number, entry in read_objects(path, "--answers"):
        key, texts = _parse(f"--answers {path}:{number}", entry, benchmarks)
        if key not in known:
            raise UserError(f"--answers {path}:{number}: {key[0]} has no problem {key[1]!r}")
        found.setdefault(key, []).extend(Answer(text=text, tokens=0, finish="stop") for text in texts)
    missing = [key for key in sorted(known) if key not in found]
    if missing:
        raise UserError(
            f"--answers {path}: lacks {len(missing):,} of {len(known):,} problems, first of all {missing[0][1]!r} of "
            f"{missing[0][0]}; give all, or evaluate fewer with --limit"
        )
    sizes = {len(answers): key for key, answers in found.items()}
    if len(sizes) > 1:
        (few, one), *_, (many, another) = sorted(sizes.items())
        raise UserError(f"--answers {path}: problem {one[1]!r} has {few} answer(s) and {another[1]!r} has {many}")
    return found


def _parse(where: str, entry: Mapping[str, Any], benchmarks: Sequence[str]) -> tuple[tuple[str, str], list[str]]:
    problem = next((entry[name] for name in _IDS if isinstance(entry.get(name), str | int)), None)
    if problem is None:
        raise UserError(f"{where}: names no problem; give problem_id")
    benchmark = entry.get("benchmark", benchmarks[0] if len(benchmarks) == 1 else None)
    if benchmark not in benchmarks:
        raise UserError(f"{where}: benchmark is {benchmark!r}, not one of {', '.join(benchmarks)}")
    texts = _texts(entry)
    if texts is None:
        raise UserError(f"{where}: holds no answer; give text, answers, or messages that end with the assistant's")
    return (benchmark, str(problem)), texts


def _texts(entry: Mapping[str, Any]) -> list[str] | None:
    several = next((entry[name] for name in _LISTS if isinstance(entry.get(name), list)), None)
    if several is not None:
        return several if all(isinstance(text, str) for text in several) and several else None
    messages = entry.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        last = messages[-1]
        return [last["content"]] if last.get("role") == "assistant" and isinstance(last.get("content"), str) else None
    one = next((entry[name] for name in _TEXTS if isinstance(entry.get(name), str)), None)
    return None if one is None else [one]
