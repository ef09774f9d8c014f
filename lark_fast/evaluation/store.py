"""The directory of an evaluation: what the model wrote, a line a problem, as soon as it is there.

eval/generations.jsonl   {benchmark, problem_id, asked, answers: [{text, tokens, finish}]}, in the order they were done
eval/manifest.json       what decides the answers (model, sampling, ...), versions, timing
eval/problems.jsonl      the verdicts, in the order of the benchmarks; written anew by each run
eval/summary.json        the measures
eval/.lock               held by the run that writes here
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lark_fast.errors import UserError
from lark_fast.evaluation.backends.backend import Answer
from lark_fast.evaluation.benchmarks import Question
from lark_fast.evaluation.results import PROBLEMS, SUMMARY
from lark_fast.files import TEMPORARY_SUFFIX, fsync_directory, write_json, writing_to
from lark_fast.hashing import hash_fields
from lark_fast.lock import LOCK, DirectoryLock

GENERATIONS, MANIFEST = "generations.jsonl", "manifest.json"
_OURS = {GENERATIONS, MANIFEST, PROBLEMS, SUMMARY, LOCK}

Key = tuple[str, str]  # (benchmark, problem_id)


class EvalStore:
    """An evaluation's directory, open for writing inside a ``with`` block.

    Args:
        directory: where it is; made when it does not exist.
        identity: everything that decides the answers but the questions. A directory begun with another is refused.
        overwrite: throw away what an evaluation left there.

    Raises:
        UserError: the directory is another evaluation's or holds something else; another run writes to it.
    """

    def __init__(self, directory: str, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.directory, self.identity = Path(directory), dict(identity)
        self._answers: dict[Key, tuple[str, list[Answer]]] = {}
        self._lock = DirectoryLock(self.directory)
        with writing_to(directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._refuse_strangers()
            self._lock.acquire()
            try:
                self._open(overwrite)
            except BaseException:
                self._lock.release()
                raise

    def __enter__(self) -> "EvalStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()

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
        line = {"benchmark": key[0], "problem_id": key[1], "asked": asked, "answers": [asdict(one) for one in answers]}
        # Half of a surrogate pair, which a byte-level tokenizer can leave, is an escape in JSON.
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._answers[key] = asked, answers

    def note(self, **facts: Any) -> None:
        """Write the manifest."""
        write_json(self.directory / MANIFEST, {"identity": self.identity, **facts})

    def _refuse_strangers(self) -> None:
        strangers = sorted(
            path.name for path in self.directory.iterdir() if path.name.removesuffix(TEMPORARY_SUFFIX) not in _OURS
        )
        if strangers:
            raise UserError(f"--out {self.directory}: holds something else ({strangers[0]}); give another directory")

    def _open(self, overwrite: bool) -> None:
        manifest, path = self.directory / MANIFEST, self.directory / GENERATIONS
        if overwrite:
            for name in _OURS - {LOCK}:
                (self.directory / name).unlink(missing_ok=True)
        if manifest.exists():
            self._refuse_another(manifest)
        elif path.exists():
            raise UserError(f"--out {self.directory}: has answers but no {MANIFEST}; --overwrite throws them away")
        else:
            self.note()
        whole = self._read(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open until the block ends
        self._file.truncate(whole)
        fsync_directory(self.directory)

    def _refuse_another(self, manifest: Path) -> None:
        try:
            there = json.loads(manifest.read_text(encoding="utf-8"))["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{manifest}: cannot be read ({error}); --overwrite begins anew") from error
        asked = json.loads(json.dumps(self.identity))
        differing = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
        if differing:
            told = ", ".join(f"{name} {there.get(name)!r} there, {asked.get(name)!r} now" for name in differing[:3])
            raise UserError(
                f"--out {self.directory}: was begun otherwise ({told}); give another directory or --overwrite"
            )

    def _read(self, path: Path) -> int:
        """Take in what is there; returns the bytes of its whole lines. What follows was never finished."""
        if not path.exists():
            return 0
        whole = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    answers = [Answer(**one) for one in entry["answers"]]
                    self._answers[entry["benchmark"], entry["problem_id"]] = entry["asked"], answers
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{path}:{number}: cannot be read ({error}); remove the line, and the problem is asked again"
                    ) from error
                whole += len(line)
        return whole


def asked_hash(question: Question) -> str:
    """What a question is, as 32 hexadecimal digits."""
    fields = [field for message in question.messages for field in (message["role"], message["content"])]
    return hash_fields(*(field.encode("utf-8", "surrogatepass") for field in fields), size=16).hex()
