"""Benchmarks in: files of problems become the questions that a model is asked, each with its right answer."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lark_fast.errors import RejectError, UserError
from lark_fast.evaluation.benchmark_files import OPTION, read_items, stem
from lark_fast.evaluation.benchmark_formats import LETTERS, Item, parse_item
from lark_fast.evaluation.checker import CHOICE, MATH
from lark_fast.rendering.inspection import visible

INSTRUCTIONS = {
    MATH: r"Please reason step by step, and put your final answer within \boxed{}.",
    CHOICE: r"Please reason step by step, and put the letter of your answer within \boxed{}.",
}
_LONGEST_NAME = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a model is asked, and what is right."""

    benchmark: str  # the file's name without its ending, fit for the name of a directory
    problem_id: str  # unique in the benchmark
    messages: tuple[Mapping[str, str], ...]  # role and content each; the last is the user's
    kind: str  # "math" or "choice"
    answer: str  # the right one; of a choice, its letter
    choices: tuple[str, ...] = ()  # the options' texts in the order shown; () for mathematics
    group: str = ""  # MATH's level, "1" to "5"; a domain; "" where there is none
    source: str
    line: int


def read_benchmarks(
    paths: Sequence[str],
    *,
    instruction: str | None = None,
    system: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """The questions of several files, see ``read_benchmark``; of benchmarks with one name the second gets "-2".

    Raises:
        UserError: as there; no files, or one of them twice.
    """
    if not paths:
        raise UserError("no benchmark was given; give a file with --benchmark")
    files = [os.path.realpath(path) for path in paths]
    for place, path in enumerate(paths):
        if files[place] in files[:place]:
            raise UserError(f"{OPTION} {visible(path)}: is given twice")
    questions: list[Question] = []
    taken: set[str] = set()
    for path in paths:
        base = name = _safe(stem(path))
        number = 1
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name)
        questions += read_benchmark(path, name=name, instruction=instruction, system=system, limit=limit, seed=seed)
    return questions


def read_benchmark(
    path: str,
    *,
    name: str | None = None,
    instruction: str | None = None,
    system: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """The questions of one file, in its order. ``benchmark_formats`` knows the fields, ``benchmark_files`` the files.

    A problem without an id is known by its place in the file, from 0. Options that have fields of their own are put
    behind the question, a line each. Conversations of the file's own stay as they are.

    Args:
        path: the file.
        name: of the benchmark; None: the file's, made safe for a directory.
        instruction: put behind the question; None: a line on boxed answers, see INSTRUCTIONS, but behind no
            conversation of the file's own; "": nothing.
        system: the system's turn; None or "": none but a conversation's own.
        limit: problems at most, the first; None: all.
        seed: of the order of options for which the file has none (GPQA); the same on every machine.

    Raises:
        UserError: a file or a problem that cannot be used, ids that come twice, no problem; names file and line.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: must be at least 1")
    benchmark = _safe(stem(path)) if name is None else name
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for place, (line, item) in enumerate(_parsed(path, seed)):
        where = f"{OPTION} {visible(path)}:{line}"
        problem_id = str(place) if item.problem_id is None else item.problem_id
        if problem_id in lines:
            raise UserError(
                f"{where}: problem {visible(problem_id)[:80]!r} stands in line {lines[problem_id]} already; "
                "give each an id of its own"
            )
        lines[problem_id] = line
        try:
            messages = _messages(item, instruction, system)
        except RejectError as error:
            raise UserError(f"{where}: {error}") from None
        questions.append(
            Question(
                benchmark=benchmark,
                problem_id=problem_id,
                messages=messages,
                kind=item.kind,
                answer=item.answer,
                choices=item.choices,
                group=item.group,
                source=path,
                line=line,
            )
        )
        if len(questions) == limit:
            break
    if not questions:
        raise UserError(f"{OPTION} {visible(path)}: holds no problem")
    return questions


def _parsed(path: str, seed: int) -> Iterator[tuple[int, Item]]:
    for line, fields in read_items(path):
        try:
            yield line, parse_item(fields, seed=seed)
        except RejectError as error:
            raise UserError(f"{OPTION} {visible(path)}:{line}: {error}") from None


def _messages(item: Item, instruction: str | None, system: str | None) -> tuple[Mapping[str, str], ...]:
    if item.messages:
        asked, messages = instruction or "", list(item.messages)
    else:
        asked, messages = INSTRUCTIONS[item.kind] if instruction is None else instruction, []
    parts = [item.text]
    if not item.listed:
        parts.append("\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, item.choices, strict=False)))
    if asked:
        parts.append(asked)
    messages[-1:] = [{"role": "user", "content": "\n\n".join(parts)}]
    if system:
        if messages[0]["role"] in ("system", "developer"):
            raise RejectError("the conversation begins with a system's turn of its own; leave --system away")
        messages.insert(0, {"role": "system", "content": system})
    return tuple(messages)


def _safe(name: str) -> str:
    """A name that can be a directory's: letters, digits, "-", "_" and "." inside."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".-")[:_LONGEST_NAME] or "benchmark"
