"""The directory of an evaluation: what the model wrote, a line a problem, as soon as it is there.

eval/generations.jsonl   {benchmark, problem_id, asked, answers: [{text, tokens, finish}]}, in the order they were done
eval/manifest.json       what decides the answers (model, sampling, ...), versions, timing
eval/problems.jsonl      the verdicts, in the order of the benchmarks; written anew by each run
eval/summary.json        the measures
eval/.lock               held by the run that writes here
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from lark_fast.errors import UserError
from lark_fast.evaluation.backends.backend import Answer
from lark_fast.evaluation.benchmarks import Question
from lark_fast.evaluation.results import PROBLEMS, SUMMARY
from lark_fast.hashing import hash_fields
from lark_fast.line_store import LineStore

GENERATIONS = "generations.jsonl"

Key = tuple[str, str]  # (benchmark, problem_id)


class EvalStore(LineStore):
    """An evaluation's directory, open for writing inside a ``with`` block.

    Args:
        directory: where it is; made when it does not exist.
        identity: everything that decides the answers but the questions. A directory begun with another is refused.
        overwrite: throw away what an evaluation left there.

    Raises:
        UserError: the directory is another evaluation's or holds something else; another run writes to it.
    """

    def __init__(self, directory: str, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self._answers: dict[Key, tuple[str, list[Answer]]] = {}
        super().__init__(directory, identity, lines=GENERATIONS, results=(PROBLEMS, SUMMARY), overwrite=overwrite)

    def take(self, entry: dict[str, Any]) -> None:
        """See ``LineStore``."""
        answers = [Answer(**one) for one in entry["answers"]]
        self._answers[entry["benchmark"], entry["problem_id"]] = entry["asked"], answers

    def answers(self, question: Question) -> list[Answer] | None:
        """What the model has answered, None where it was not asked yet.

        Raises:
            UserError: it was asked something else by that name.
        """
        found = self._answers.get((question.benchmark, question.problem_id))
        if found is None:
            return None
        asked, answers = found
        if asked != asked_hash(question):
            raise UserError(
                f"{question.source}:{question.line}: problem {question.problem_id!r} is not what was asked before in "
                f"{self.directory}; --overwrite, or give another directory"
            )
        return answers

    def add(self, question: Question, answers: Iterable[Answer]) -> None:
        """Keep a problem's answers; after this returns they survive anything.

        Raises:
            OSError: the disk is full or cannot be written to.
        """
        key, asked, answers = (question.benchmark, question.problem_id), asked_hash(question), list(answers)
        self.keep(
            {"benchmark": key[0], "problem_id": key[1], "asked": asked, "answers": [asdict(one) for one in answers]}
        )
        self._answers[key] = asked, answers


def asked_hash(question: Question) -> str:
    """What a question is, as 32 hexadecimal digits."""
    fields = [field for message in question.messages for field in (message["role"], message["content"])]
    return hash_fields(*(field.encode("utf-8", "surrogatepass") for field in fields), size=16).hex()
