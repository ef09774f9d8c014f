"""Benchmark files, in the forms they are published in, as questions with a right answer."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lark_fast.errors import UserError
from lark_fast.evaluation.answers import last_box
from lark_fast.evaluation.checker import CHOICE, MATH
from lark_fast.hashing import hash_fields
from lark_fast.pool.objects import MAX_OBJECT_BYTES, read_objects

OPTION = "--benchmark"
INSTRUCTIONS = {
    MATH: "Please reason step by step, and put your final answer within \\boxed{}.",
    CHOICE: "Please reason step by step, and put the letter of your answer within \\boxed{}.",
}
# By lower-case name; the first that a record has counts.
_QUESTIONS = ("problem", "question", "prompt")
_IDS = ("problem_id", "unique_id", "id", "record id", "question_id", "task_id")
_GROUPS = ("level", "high-level domain", "category", "subject", "domain")
_OPTIONS = ("options", "choices")
_LETTERS = ("answerkey", "answer", "correct_answer", "label")
_GPQA = ("correct answer", "incorrect answer 1", "incorrect answer 2", "incorrect answer 3")
_SOLVED = re.compile(r"####\s*(\S.*)\s*$")
_LETTER = re.compile(r"[A-Z]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A problem of a benchmark.

    Attributes:
        benchmark: its name, which is the file's.
        problem_id: no two problems of a benchmark have the same.
        messages: what the model is asked.
        kind: "math" or "choice".
        answer: the right one; of a choice, its letter.
        choices: the options' texts in the order shown; () where they stand in the question alone.
        group: the level of a MATH problem, the domain of one of GPQA, "" where there is none.
        source, line: where it stands.
    """

    benchmark: str
    problem_id: str
    messages: tuple[Mapping[str, str], ...]
    kind: str
    answer: str
    choices: tuple[str, ...] = ()
    group: str = ""
    source: str
    line: int


def read_benchmarks(
    paths: Sequence[str], *, instruction: str | None = None, system: str | None = None, limit: int | None = None
) -> list[Question]:
    """Read benchmark files, plain, .gz or .zst.

    JSONL, JSON lists, Parquet and CSV, with the fields of MATH, MATH-500, AIME, AMC, GSM8K, GPQA, MMLU-Pro and ARC, or
    ``messages`` that end with the user's, and ``answer``.

    Args:
        paths: of the files.
        instruction: stands behind each question; None: to reason and to box the answer, "": none. Questions that come
            as ``messages`` get one only where it is given.
        system: a system message, where a question brings none.
        limit: problems of each file.

    Raises:
        UserError: a file cannot be read, or one of its records is no question with an answer; names file and line.
    """
    if not paths:
        raise UserError(f"{OPTION}: give at least one file")
    questions: list[Question] = []
    names: set[str] = set()
    for path in paths:
        name = stem = _name(path)
        for number in range(2, len(paths) + 2):
            if name not in names:
                break
            name = f"{stem}-{number}"
        names.add(name)
        questions += _read(path, name, instruction, system, limit)
    return questions


def _read(path: str, name: str, instruction: str | None, system: str | None, limit: int | None) -> Iterator[Question]:
    known: dict[str, int] = {}
    for number, (line, record) in enumerate(_records(path)):
        if number == limit:
            return
        where = f"{OPTION} {path}:{line}"
        fields = {str(key).strip().lower(): value for key, value in record.items()}
        problem_id = _text(_first(fields, _IDS)) or str(number)
        if problem_id in known:
            raise UserError(f"{where}: problem {problem_id!r} is there already, in line {known[problem_id]}")
        known[problem_id] = line
        kind, answer, choices = _answer(fields, problem_id, where)
        yield Question(
            benchmark=name,
            problem_id=problem_id,
            messages=_messages(fields, kind, choices, instruction, system, where),
            kind=kind,
            answer=answer,
            choices=choices,
            group=_text(_first(fields, _GROUPS)).removeprefix("Level "),
            source=path,
            line=line,
        )
    if not known:
        raise UserError(f"{OPTION} {path}: holds no problem")


def _records(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not Path(path).is_file():
        raise UserError(f"{OPTION} {path}: there is no such file")
    if not path.lower().endswith(".csv"):
        yield from read_objects(path, OPTION)
        return
    csv.field_size_limit(MAX_OBJECT_BYTES)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for row in rows:
                yield rows.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{OPTION} {path}: cannot be read: {error}") from error


def _answer(fields: Mapping[str, Any], problem_id: str, where: str) -> tuple[str, str, tuple[str, ...]]:
    """(kind, right answer, options)."""
    if all(_text(fields.get(name)) for name in _GPQA):
        # In an order of the problem's own, which is the same on every machine.
        shown = sorted(_GPQA, key=lambda name: hash_fields(problem_id.encode(), name.encode(), size=8))
        return CHOICE, chr(ord("A") + shown.index(_GPQA[0])), tuple(_text(fields[name]) for name in shown)
    options = _first(fields, _OPTIONS)
    if options is not None:
        return CHOICE, *_chosen(options, fields, where)
    answer = _text(fields.get("answer"))
    if not answer and _text(fields.get("solution")):
        answer = last_box(_text(fields["solution"])) or ""
    if not answer:
        raise UserError(f"{where}: has no answer; there are the fields {', '.join(fields)}")
    solved = _SOLVED.search(answer)
    if solved:
        return MATH, solved[1].strip(), ()
    # GPQA with its options in the question.
    lettered = _LETTER.fullmatch(answer) and re.search(rf"(?m)^\W*{answer}\W", _text(_first(fields, _QUESTIONS)))
    return (CHOICE if lettered else MATH), answer, ()


def _chosen(options: Any, fields: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """(letter of the right option, options)."""
    labels = None
    if isinstance(options, Mapping):
        labels, options = options.get("label"), options.get("text")
    if not isinstance(options, Sequence) or isinstance(options, str) or len(options) < 2:
        raise UserError(f"{where}: its options are no list of two or more texts")
    texts = tuple(_text(option) for option in options)
    letters = [chr(ord("A") + place) for place in range(len(texts))]
    named = [_text(label) for label in labels] if isinstance(labels, Sequence) else letters
    index = fields.get("answer_index")
    right = letters[index] if isinstance(index, int) and 0 <= index < len(letters) else None
    said = _text(_first(fields, _LETTERS))
    if right is None and said in named and len(named) == len(letters):
        right = letters[named.index(said)]
    if right is None and texts.count(said) == 1:
        right = letters[texts.index(said)]
    if right is None:
        raise UserError(f"{where}: its answer {said!r} is none of its options")
    return right, texts


def _messages(
    fields: Mapping[str, Any],
    kind: str,
    choices: Sequence[str],
    instruction: str | None,
    system: str | None,
    where: str,
) -> tuple[Mapping[str, str], ...]:
    own = fields.get("messages")
    if own is not None:
        messages = _own_messages(own, where)
        added = instruction or ""
    else:
        asked = _text(_first(fields, _QUESTIONS))
        if not asked:
            names = ", ".join((*_QUESTIONS, "messages"))
            raise UserError(f"{where}: has no question ({names}); there are the fields {', '.join(fields)}")
        options = [f"{chr(ord('A') + place)}. {choice}" for place, choice in enumerate(choices)]
        messages = [{"role": "user", "content": "\n".join([asked, *options])}]
        added = INSTRUCTIONS[kind] if instruction is None else instruction
    if added:
        messages[-1] = {"role": "user", "content": f"{messages[-1]['content']}\n\n{added}"}
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return tuple(messages)


def _own_messages(own: Any, where: str) -> list[Mapping[str, str]]:
    fits = (
        isinstance(own, Sequence)
        and own
        and all(
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in own
        )
    )
    if not fits:
        raise UserError(f"{where}: its messages are no list of {{role, content}}")
    if own[-1]["role"] != "user":
        raise UserError(f"{where}: its messages end with {own[-1]['role']!r}, so there is nothing to answer")
    return [{"role": message["role"], "content": message["content"]} for message in own]


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # AMC's answers are 142.0
    return str(value).strip() if isinstance(value, str | int | float) else ""


def _name(path: str) -> str:
    """A benchmark's name: the file's, without what only says how it is written."""
    name = Path(path).name
    while Path(name).suffix.lower() in (".gz", ".zst", ".jsonl", ".json", ".ndjson", ".csv", ".parquet"):
        name = Path(name).stem
    return re.sub(r"[^\w.-]+", "_", name) or "benchmark"
