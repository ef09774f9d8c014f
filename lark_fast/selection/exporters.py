"""A selection in the form that other training programs read, and what each does with the weights.

docs/formats.md has the formats, and where each was looked up. Line i of every export is line i of train.jsonl. The
pool's own columns stay behind: where their types vary from row to row, ``datasets`` could not load the file.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lark_fast.errors import UserError
from lark_fast.files import atomic_open, write_json
from lark_fast.pool.records import Message

OPTION = "--export"
FILE_NAME = "train.jsonl"
Line = dict[str, Any]

_LLAMA_FACTORY_SMALLEST = 1e-6  # v1 does not train on turns of less
_FIREWORKS_ROWS = (3, 3_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One program's form of a row."""

    name: str
    program: str
    weights: str  # what the program does with them, for the summary
    line: Callable[[Sequence[Message], float, Mapping[str, Any]], Line]  # from messages, weight and the row
    mean_one: bool = False  # the program multiplies losses by weights: they are written with a mean of 1
    caution: Callable[[Sequence[Message], float], str | None] = lambda messages, weight: None  # what it does to a row
    rows: tuple[int, int] | None = None  # how many it takes
    files: Mapping[str, Any] | None = None  # further JSON files, by name


class Exporter:
    """A context that writes a selection for one program, row by row; the files appear when it is left without error.

    Args:
        name: of FORMATS.
        directory: the selection's; the files lie in its folder of this name.
        mean_weight: of all rows to come.

    Attributes:
        paths: the files.

    Raises:
        UserError: an unknown name.
        ValueError: a mean weight that is not above 0.
    """

    def __init__(self, name: str, directory: str | Path, mean_weight: float) -> None:
        self.format = find_format(name)
        if not mean_weight > 0:
            raise ValueError(f"mean_weight={mean_weight}: must be above 0")
        self._divisor = mean_weight if self.format.mean_one else 1.0
        self._directory = Path(directory) / name
        self.paths = files_of(name, directory)
        self._rows, self._cautions = 0, Counter()
        self._file: IO[str] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Exporter":
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = self._stack.enter_context(atomic_open(self._directory / FILE_NAME))
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._stack.__exit__(*error)
            return
        with self._stack:
            for file, content in (self.format.files or {}).items():
                write_json(self._directory / file, content)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row of train.jsonl.

        Raises:
            UserError: a row of token ids.
        """
        messages = row.get("messages")
        if messages is None:
            meta = row.get("meta") or {}
            raise UserError(
                f"{OPTION} {self.format.name}: problem {meta.get('problem_id')!r}, candidate "
                f"{meta.get('candidate_id')!r} is made of token ids, and exports are made of messages; "
                f"leave {OPTION} out: lark-fast train takes token ids as they are"
            )
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        weight = row["weight"] / self._divisor
        line = self.format.line(messages, weight, row)
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._rows += 1
        caution = self.format.caution(messages, weight)
        if caution is not None:
            self._cautions[caution] += 1

    def notes(self) -> list[str]:
        """What a reader should know of the export, a line a fact."""
        scaled = f" The weights were divided by their mean, {self._divisor:.6g}." if self.format.mean_one else ""
        said = [f"{self.paths[0]}: {self._rows:,} rows for {self.format.program}. {self.format.weights}{scaled}"]
        said += [f"{self.paths[0]}: {count:,} rows: {caution}" for caution, count in self._cautions.items()]
        if self.format.rows is not None and not self.format.rows[0] <= self._rows <= self.format.rows[1]:
            fewest, most = self.format.rows
            said.append(f"{self.paths[0]}: {self.format.program} takes from {fewest:,} to {most:,} rows")
        return said


def export(name: str, rows: Iterable[Mapping[str, Any]], directory: str | Path, mean_weight: float) -> list[Path]:
    """Write the rows of a train.jsonl for another program; see ``Exporter``. Returns the files."""
    with Exporter(name, directory, mean_weight) as exporter:
        for row in rows:
            exporter.write(row)
    return exporter.paths


def files_of(name: str, directory: str | Path) -> list[Path]:
    """Where an export's files lie in a selection's directory."""
    return [Path(directory, name, file) for file in (FILE_NAME, *(find_format(name).files or {}))]


def find_format(name: str) -> Format:
    """The format of this name, or a UserError."""
    if name not in FORMATS:
        raise UserError(f"{OPTION} {name}: unknown; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def _weighted_messages(messages: Sequence[Message], weight: float, row: Mapping[str, Any]) -> Line:
    return {"messages": messages, "weight": weight}


def _prompt_and_completion(messages: Sequence[Message], weight: float, row: Mapping[str, Any]) -> Line:
    last = _answers(messages)[-1]
    return {"prompt": messages[:last], "completion": messages[last : last + 1], "weight": weight}


def _llama_factory_v1(messages: Sequence[Message], weight: float, row: Mapping[str, Any]) -> Line:
    return {
        "messages": [
            {
                "role": message["role"],
                "content": [{"type": "text", "value": message["content"]}],
                "loss_weight": weight if message["role"] == "assistant" else 0.0,
            }
            for message in messages
        ]
    }


def _ms_swift(messages: Sequence[Message], weight: float, row: Mapping[str, Any]) -> Line:
    # null is its default. Turns without the key would make ``datasets`` keep the whole as text, with numbers rounded.
    return {
        "messages": [
            message | {"loss_scale": weight if message["role"] == "assistant" else None} for message in messages
        ]
    }


def _reference(messages: Sequence[Message], weight: float, row: Mapping[str, Any]) -> Line:
    meta = row["meta"]
    # Ids are strings and numbers in one pool; a column of ``datasets`` is one of them.
    named = {name: str(meta[name]) for name in ("problem_id", "candidate_id", "teacher")}
    return {"messages": messages, "meta": {**named, "score": meta["g_hat"], "train_weight": weight}}


def _answers(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _last_answer_only(messages: Sequence[Message], weight: float) -> str | None:
    answers = _answers(messages)
    if not answers[-1]:
        return "TRL takes no empty prompt; the export trl has none"
    if len(answers) > 1:
        return "of several answers only the last one is trained on; the export trl has them all"
    return _turns_behind(messages)


def _turns_behind(messages: Sequence[Message]) -> str | None:
    return None if messages[-1]["role"] == "assistant" else "the turns behind the last answer are left out"


def _llama_factory_skips(messages: Sequence[Message], weight: float) -> str | None:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    wanted = [("user", "tool"), ("assistant",)]
    if len(turns) % 2 or any(turn["role"] not in wanted[index % 2] for index, turn in enumerate(turns)):
        return "LLaMA-Factory skips them: after the system's, turns must alternate and end with an answer"
    return None


def _llama_factory_v1_splits(messages: Sequence[Message], weight: float) -> str | None:
    if weight <= _LLAMA_FACTORY_SMALLEST:
        return f"not trained on: a loss_weight of {_LLAMA_FACTORY_SMALLEST:g} or less counts as 0"
    if len(_answers(messages)) > 1:
        return "LLaMA-Factory makes an example of each answer, each with the row's weight"
    return None


def _fireworks_order(messages: Sequence[Message], weight: float) -> str | None:
    if any(message["role"] == "system" for message in messages[1:]):
        return "Fireworks takes a system turn at the beginning only"
    return None


def _reference_mislabels(messages: Sequence[Message], weight: float) -> str | None:
    answers = _answers(messages)
    if answers != [len(messages) - 1]:
        return "the reference takes the wrong tokens for the answer's unless there is one answer, at the end"
    return None


_LLAMA_FACTORY_INFO = {
    "lark_fast": {
        "file_name": FILE_NAME,
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "observation_tag": "tool",
            "function_tag": "function_call",
            "system_tag": "system",
        },
    }
}

FORMATS: dict[str, Format] = {
    format_.name: format_
    for format_ in (
        Format(
            name="trl",
            program="TRL",
            weights="lark_fast.trainers.WeightedSFTTrainer uses the weights; TRL's own SFTTrainer does not.",
            line=_weighted_messages,
        ),
        Format(
            name="trl-prompt-completion",
            program="TRL",
            weights="lark_fast.trainers.WeightedSFTTrainer uses the weights; TRL's own SFTTrainer does not.",
            line=_prompt_and_completion,
            caution=_last_answer_only,
        ),
        Format(
            name="llama-factory",
            program="LLaMA-Factory",
            weights="The weights are NOT used: only its version 1 (USE_V1=1) has any, see the export llama-factory-v1.",
            line=_weighted_messages,
            caution=_llama_factory_skips,
            files={"dataset_info.json": _LLAMA_FACTORY_INFO},
        ),
        Format(
            name="llama-factory-v1",
            program="LLaMA-Factory with USE_V1=1",
            weights="The weights are used within a micro-batch and cancel when it holds one row.",
            line=_llama_factory_v1,
            caution=_llama_factory_v1_splits,
        ),
        Format(
            name="ms-swift",
            program="ms-swift, 4.2 or later",
            weights="The weights are used with --is_binary_loss_scale false, and NOT without.",
            line=_ms_swift,
            mean_one=True,
        ),
        Format(
            name="axolotl",
            program="axolotl",
            weights="The weights are NOT used: it has none, and trains on a turn or does not.",
            line=_weighted_messages,
        ),
        Format(
            name="fireworks",
            program="Fireworks",
            weights="The weights are used.",
            line=_weighted_messages,
            mean_one=True,
            caution=_fireworks_order,
            rows=_FIREWORKS_ROWS,
        ),
        Format(
            name="reference",
            program="the reference",
            weights="The weights are used within a micro-batch and cancel when it holds one row.",
            line=_reference,
            caution=_reference_mislabels,
        ),
    )
}
