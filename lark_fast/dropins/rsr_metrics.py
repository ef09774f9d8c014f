"""The released Rank-Surprisal Ratio program (arXiv 2601.14249, rsr_cal.py): its input, its files, its numbers.

As there, a data file's inference results are kept and taken again when they are there. A run that is stopped goes on
with the window of samples at which it was.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lark_fast.dropins.rsr_files import (
    INFERRED,
    METRICS,
    Begun,
    DataFile,
    find_data,
    read_inference,
    upsert_tsv,
    write_inference,
    write_jsonl,
)
from lark_fast.errors import UserError
from lark_fast.files import writing_to
from lark_fast.pool.objects import read_objects
from lark_fast.progress import track

if TYPE_CHECKING:
    from lark_fast.dropins.rsr_numbers import Tokens
    from lark_fast.scoring.scorer import Scorer

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RsrConfig:
    """What ``lark-fast rsr-metrics`` was asked to do; names are the original's."""

    model_path: str
    model_name: str
    data_root: str
    data_path: str
    output_root: str
    dtype: str = "bfloat16"
    tag: str = ""
    run_mode: str = "together"  # "infer_only", "metrics_only"
    filter_file_suffix: str = ""
    rank_clip_r: int = 100
    max_model_len: int | None = None
    chat_template: str = "qwen"  # "llama3": whose markers
    infer_save_format: str = "parquet"  # "jsonl"; "": not kept
    base: str | None = None  # of an adapter
    device_map: str | None = None  # see ``load_student``
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.run_mode != "together" and not self.infer_save_format:
            raise ValueError(f"--infer_save_format: cannot be empty with --run_mode {self.run_mode}")

    @property
    def run_name(self) -> str:
        """The name of its directories."""
        return f"{self.model_name}_{self.tag}" if self.tag else self.model_name

    def inferred(self, data: DataFile, suffix: str) -> Path:
        """A file among the inference results."""
        return self._below(INFERRED, data, suffix)

    def metrics(self, data: DataFile) -> Path:
        """The lines of a file's samples."""
        return self._below(METRICS, data, ".jsonl")

    @property
    def table(self) -> Path:
        """A line a data file."""
        return Path(self.output_root) / f"rsr_{self.run_name}.tsv"

    def _below(self, folder: str, data: DataFile, suffix: str) -> Path:
        place = Path(self.output_root) / folder / self.run_name / data.relative
        return place.with_name(place.name + suffix)


def rsr_metrics(config: RsrConfig, say: Say) -> int:
    """Write the sample metrics of every data file; returns of how many files there are results.

    Args:
        config: see ``RsrConfig``.
        say: hears a line a file.

    Raises:
        UserError: bad input; what was finished is kept.
    """
    outputs = [Path(config.output_root) / folder for folder in (INFERRED, METRICS)]
    files = find_data(config.data_path, config.data_root, config.filter_file_suffix, leave_out=outputs)
    # Before hours are spent on the first of them.
    sizes = {data: _n_samples(config, data) for data in files if _is_to_infer(config, data)}
    students, done = _Students(config), 0
    with writing_to(config.output_root):
        for data in files:
            if data in sizes:
                done += _inferred(config, students.scorer, data, sizes[data], say)
            else:
                done += _taken(config, data, say)
    return done


def _kept(config: RsrConfig, data: DataFile) -> Path | None:
    """Where a file's inference results are kept; None where they are not."""
    return config.inferred(data, f".{config.infer_save_format}") if config.infer_save_format else None


def _is_to_infer(config: RsrConfig, data: DataFile) -> bool:
    kept = _kept(config, data)
    return config.run_mode != "metrics_only" and (kept is None or config.overwrite or not kept.exists())


def _taken(config: RsrConfig, data: DataFile, say: Say) -> bool:
    """Measure with the inference results that are there; whether they are."""
    kept = _kept(config, data)
    assert kept is not None
    if not kept.exists():
        say(f"{data.name}: there is no {kept}; --run_mode together makes it")
        return False
    say(f"{data.name}: {kept} is there and is taken")
    if config.run_mode != "infer_only":
        _measure(config, data, read_inference(kept), None, say)
    return True


def _inferred(config: RsrConfig, scorer: "Scorer", data: DataFile, n_samples: int, say: Say) -> bool:
    """Score a file's samples and measure; whether any could be scored."""
    kept, started = _kept(config, data), time.monotonic()
    begun = _infer(config, scorer, data, n_samples, say)
    seconds = time.monotonic() - started
    if not begun.n_samples:
        say(f"{data.name}: no sample in it has an assistant's turn")
    else:
        if kept is not None:
            write_inference(kept, begun.results())
            say(f"{data.name}: {begun.n_samples:,} samples scored: {kept}")
        if config.run_mode != "infer_only":
            _measure(config, data, begun.results(), seconds, say)
    begun.remove()
    return begun.n_samples > 0


def _measure(
    config: RsrConfig, data: DataFile, results: Iterable[dict[str, Any]], seconds: float | None, say: Say
) -> None:
    """Write a file's sample metrics and its row of the table."""
    from lark_fast.dropins.rsr_numbers import DatasetMetrics, sample_metrics

    started, total, path = time.monotonic(), DatasetMetrics(), config.metrics(data)

    def lines() -> Iterator[dict[str, Any]]:
        for result in results:
            if result["nlls"]:
                line = sample_metrics(result, config.rank_clip_r)
                total.add(line)
                yield line

    write_jsonl(path, lines())
    row = total.row()
    took = {"infer_seconds": seconds, "metrics_seconds": time.monotonic() - started}
    upsert_tsv(config.table, {"data_name": data.name, **row, **took})
    say(f"{data.name}: {total.n_samples:,} samples, ratio {row['rank_surprisal_ratio']:.5f}: {path}")


def _infer(config: RsrConfig, scorer: "Scorer", data: DataFile, n_samples: int, say: Say) -> Begun:
    """All of a file's samples through the student, but for those that a stopped run has done."""
    from lark_fast.dropins.rsr_numbers import infer, tokenise
    from lark_fast.student_files import find_student

    with open(data.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    identity = {
        "data": digest,
        **find_student(config.model_path, config.base).fingerprint(),
        "dtype": str(scorer.student.dtype).removeprefix("torch."),
        "max_model_len": config.max_model_len,
        "rank_clip_r": config.rank_clip_r,
        "chat_template": config.chat_template,
    }
    folder = config.inferred(data, ".partial")
    with (
        Begun(folder, identity, overwrite=config.overwrite) as begun,
        track(f"scoring {data.name}", n_samples) as progress,
    ):
        samples = ((f"{data.path}:{line}", sample) for line, sample in read_objects(str(data.path), "--data_path"))
        sequences = tokenise(
            samples,
            scorer.student.tokenizer,
            chat_template=config.chat_template,
            max_model_len=config.max_model_len,
        )
        sequences = _telling(sequences, scorer.student.max_positions, data.name, say)
        for window in infer(scorer, sequences, rank_clip_r=config.rank_clip_r, skip=begun.n_samples):
            begun.add(window)
            progress.update(begun.n_samples, f"{begun.n_samples:,} samples")
    return begun


def _telling(sequences: Iterable["Tokens"], positions: int | None, name: str, say: Say) -> Iterator["Tokens"]:
    """The sequences; the first that is longer than what the student was built for is told of."""
    told = positions is None
    for one in sequences:
        if not told and len(one.input_ids) > positions:
            say(f"{name}: samples are longer than the student's {positions} positions; --max_model_len cuts them")
            told = True
        yield one


def _n_samples(config: RsrConfig, data: DataFile) -> int:
    """How many samples a file has, once it is known that they can be read and that their ids can be written.

    Raises:
        UserError: they cannot, or there is none.
    """
    from lark_fast.dropins.rsr_numbers import sample_id

    kinds: dict[type, str] = {}
    index = -1
    for index, (line, sample) in enumerate(read_objects(str(data.path), "--data_path")):
        if "messages" not in sample:
            continue
        where, name = f"{data.path}:{line}", sample_id(sample, index)
        if type(name) not in (int, str):
            raise UserError(f"{where}: its id is neither an integer nor a string: {name!r}")
        kinds.setdefault(type(name), where)
        if len(kinds) > 1 and config.infer_save_format == "parquet":
            raise UserError(
                f"{where}: ids are integers here and strings there, which a Parquet column cannot hold; "
                "--infer_save_format jsonl can"
            )
    if index < 0:
        raise UserError(f"--data_path {data.path}: holds no sample")
    return index + 1


class _Students:
    """The student, loaded when the first file needs it."""

    def __init__(self, config: RsrConfig) -> None:
        self._config = config

    @cached_property
    def scorer(self) -> "Scorer":
        """It, ready to score.

        Raises:
            UserError: it cannot be loaded, or its tokenizer has no chat template.
        """
        from lark_fast.scoring.scorer import Scorer
        from lark_fast.student import load_config, load_student
        from lark_fast.student_files import find_student

        config = self._config
        files, dtype = find_student(config.model_path, config.base), config.dtype
        if dtype == "auto":  # the checkpoint's own there, on a CPU too
            own = getattr(load_config(files, config.trust_remote_code), "dtype", None)
            dtype = str(own or "float32").removeprefix("torch.")
        student = load_student(
            files, dtype=dtype, device_map=config.device_map, trust_remote_code=config.trust_remote_code
        )
        if not student.tokenizer.chat_template:
            raise UserError(f"{config.model_path}: no chat template there; add a chat_template.jinja")
        return Scorer(student)
