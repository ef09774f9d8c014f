"""Scores as columns of a Hugging Face dataset, one in memory or a stream.

from lark_fast.dropins.datasets_map import ScoreRows, add_g_hat

scored = dataset.map(ScoreRows("path/to/student"), batched=True)
ranked = add_g_hat(scored)                                # once all candidates of a problem are there
usable = ranked.filter(lambda row: not row["rejected"])
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lark_fast.errors import RejectError
from lark_fast.student_files import whole_path

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

    from lark_fast.pool.records import Record
    from lark_fast.rendering.renderer import Rendered, RenderOptions
    from lark_fast.scoring.scorer import Scorer

# What a row is read from; other columns may be images or anything else, and are not looked at.
READ = (
    *("problem_id", "messages", "conversations", "system", "prompt", "completion", "response", "reasoning_content"),
    *("input_ids", "labels"),
)
_COUNTS = ("n_tokens", "n_input_tokens")
_MEANS = ("nll", "brier", "brier_topk", "entropy", "rank_mean", "rsr", "rho")


class ScoreRows:
    """A function for ``dataset.map(..., batched=True)`` that scores rows of any pool format.

    Columns added: n_tokens, n_input_tokens, truncated, nll, brier, entropy, rank_mean, rsr, rho as in
    ``lark_fast.TrajectoryScore``, brier_topk where ``top_k`` is given, ``token_hash`` (equal for equal tokens), and
    ``problem_id`` where the dataset has none. ``rejected`` is "" for a row that was scored; else it says why not, and
    the row's other new columns are None.

    The student is loaded by the process that scores, when it first does. So the object can be pickled, and what
    ``datasets`` caches is found again for the same options and the same student: a local one that was written anew, or
    whose ``base`` was, is another. With ``num_proc`` each process loads its own and computes in one thread. Where there
    are several GPUs, and with ``with_rank=True``, each takes one in turn; CUDA asks for
    ``multiprocess.set_start_method("spawn")`` first.

    A first batch in which no row can be scored leaves its columns without a type, which ``datasets`` then refuses to
    change: ``map(..., features=rows.features(dataset.features))`` states them.

    Args:
        student: directory or hub id.
        base, device, dtype, device_map: as in ``load_student``.
        top_k: also compute the Brier score over the ``top_k`` largest logits and build rho from it (the paper: 50).
        options: how rows are rendered and which of their tokens are scored.
        chat_template: a Jinja template to use in place of the tokenizer's own.
        tokens_per_batch: tokens of one forward pass; None: what fits.
        strict: raise at the first row that cannot be scored.
        trust_remote_code: run code that the checkpoint brings along.
    """

    def __init__(
        self,
        student: str | os.PathLike[str],
        *,
        base: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        device_map: str | None = None,
        top_k: int | None = None,
        options: "RenderOptions | None" = None,
        chat_template: str | None = None,
        tokens_per_batch: int | None = None,
        strict: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.student, self.base = whole_path(student), None if base is None else whole_path(base)
        self.device, self.dtype, self.device_map = device, dtype, device_map
        self.top_k, self.options = top_k, options
        self.chat_template, self.tokens_per_batch, self.strict = chat_template, tokens_per_batch, strict
        self.trust_remote_code = trust_remote_code
        self._files = _stamps(Path(self.student)), None if base is None else _stamps(Path(self.base))
        self._scorer: Scorer | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the loaded student: other processes load their own, and it is no part of a cache's key."""
        return self.__dict__ | {"_scorer": None}

    def __call__(self, batch: Mapping[str, Sequence[Any]], rank: int | None = None) -> dict[str, list[Any]]:
        """Score a batch of rows, given as columns.

        Args:
            batch: the columns.
            rank: of the process, with ``with_rank=True``; decides about the GPU where there are several.

        Returns:
            The new columns.

        Raises:
            ValueError: the columns are those of a single row; with ``strict``, a row cannot be scored.
            UserError: the student cannot be loaded.
        """
        known = [name for name in READ if name in batch]
        _refuse_single_row(batch, known)
        columns = {name: batch[name] for name in known}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if not columns:  # nothing that could be scored, but a row each
            rows = [{} for _ in (next(iter(batch.values())) if batch else ())]
        scorer = self._scorer = self._scorer or self._load(rank)
        records, rendered, reasons = self._rendered(scorer, rows)
        scored = iter(scorer.score_rendered([one for one in rendered if one is not None]))
        stats = [None if one is None else next(scored) for one in rendered]

        def column(name: str) -> list[Any]:
            return [None if one is None else getattr(one, name) for one in stats]

        made = {name: column(name) for name in (*_COUNTS, "truncated", *self._means())}
        made["token_hash"] = [None if one is None else one.token_hash.hex() for one in stats]
        made["rejected"] = reasons
        if "problem_id" not in batch:
            made["problem_id"] = [None if one is None else one.problem_id for one in records]
        return made

    def features(self, features: "Features") -> "Features":
        """A dataset's features and those of the new columns, for ``map(..., features=...)``."""
        from datasets import Features, Value

        texts = ("token_hash", "rejected", *(() if "problem_id" in features else ("problem_id",)))
        kinds = {"int64": _COUNTS, "bool": ("truncated",), "float64": self._means(), "string": texts}
        return Features({**features, **{name: Value(kind) for kind, names in kinds.items() for name in names}})

    def _means(self) -> tuple[str, ...]:
        return tuple(name for name in _MEANS if name != "brier_topk" or self.top_k is not None)

    def _load(self, rank: int | None) -> "Scorer":
        from lark_fast.rendering.renderer import RenderOptions
        from lark_fast.scoring.scorer import Scorer
        from lark_fast.student import load_student

        _thread_by_thread()
        student = load_student(
            self.student,
            base=self.base,
            device=self._device(rank),
            dtype=self.dtype,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
        )
        return Scorer(
            student,
            top_k=self.top_k,
            options=(self.options or RenderOptions()).fitting(student.max_positions),
            chat_template=self.chat_template,
            tokens_per_batch=self.tokens_per_batch,
        )

    def _device(self, rank: int | None) -> str:
        import torch

        if (
            rank is None
            or self.device_map is not None
            or self.device not in ("auto", "cuda")
            or torch.cuda.device_count() < 2
        ):
            return self.device
        return f"cuda:{rank % torch.cuda.device_count()}"

    def _rendered(
        self, scorer: "Scorer", rows: Sequence[dict[str, Any]]
    ) -> tuple[list["Record | None"], list["Rendered | None"], list[str]]:
        from lark_fast.pool.records import normalise

        records: list[Record | None] = [None] * len(rows)
        rendered: list[Rendered | None] = [None] * len(rows)
        reasons = [""] * len(rows)
        for index, row in enumerate(rows):
            # A column that only some rows have is None in the others; numbers may come as tensors.
            raw = {name: _plain(value) for name, value in row.items() if value is not None}
            try:
                records[index] = normalise(raw, ordinal=index)
                rendered[index] = scorer.renderer(records[index])
            except RejectError as error:
                if self.strict:
                    raise ValueError(f"row {index} of its batch: {error}") from error
                reasons[index] = str(error)
        return records, rendered, reasons


def add_g_hat(
    dataset: "Dataset | IterableDataset", *, problem: str = "problem_id", column: str = "g_hat"
) -> "Dataset | IterableDataset":
    """Add each row's g_hat (see ``lark_fast.g_hat``) to what ``ScoreRows`` has scored.

    Made of ``brier_topk`` where there is one, else of ``brier``. Rows that were not scored get None and count for
    nothing; candidates of a problem with the same tokens get the same number.

    Args:
        dataset: with the columns of ``ScoreRows``. In a stream the rows of a problem follow one another.
        problem: the column that says which rows are candidates of one problem.
        column: to add, or to replace.

    Raises:
        ValueError: a column is missing; a scored row has no problem. While a stream is read: a problem comes a second
            time.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, IterableDataset):
        arguments = {"dataset": dataset, "problem": problem, "column": column}
        return IterableDataset.from_generator(_stream_with_g_hat, gen_kwargs=arguments)
    if not isinstance(dataset, Dataset):
        raise ValueError(f"a Dataset or an IterableDataset, not a {type(dataset).__name__}; of several, each by itself")
    import pyarrow as pa

    names = _columns(dataset.column_names, problem)
    table = dataset.select_columns(names).with_format("arrow")[:]
    values = _g_hat_of(table, names)
    rest = dataset.remove_columns(column) if column in dataset.column_names else dataset
    return rest.add_column(column, pa.array(values, pa.float64()))


def _stream_with_g_hat(dataset: "IterableDataset", problem: str, column: str) -> Iterator[dict[str, Any]]:
    """The rows of a stream, held back until their problem is complete."""
    done: set[Any] = set()
    group: list[dict[str, Any]] = []
    for row in dataset:
        if problem not in row:
            _columns(list(row), problem)
        if group and row[problem] != group[0][problem]:
            done.add(group[0][problem])
            yield from _group_with_g_hat(group, problem, column)
            group = []
        if row[problem] in done:
            raise ValueError(f"{problem} {row[problem]!r} comes again behind others: sort the rows by it first")
        group.append(row)
    if group:
        yield from _group_with_g_hat(group, problem, column)


def _group_with_g_hat(group: list[dict[str, Any]], problem: str, column: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    names = _columns(list(group[0]), problem)
    table = pa.table({name: [row[name] for row in group] for name in names})
    for row, value in zip(group, _g_hat_of(table, names), strict=True):
        yield row | {column: value}


def _g_hat_of(table: Any, names: Sequence[str]) -> list[float | None]:
    """g_hat of a table's rows; None where there is no score."""
    import numpy as np
    import pyarrow as pa

    from lark_fast.scoring.finishing import first_with_same_tokens
    from lark_fast.scoring.learnability import g_hat

    def codes(name: str) -> np.ndarray:
        values = table[name].combine_chunks()
        if pa.types.is_null(values.type):
            return np.full(len(values), -1)
        return values.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)

    def numbers(name: str) -> np.ndarray:
        return table[name].cast(pa.float64()).to_numpy()

    problem, tokens = codes(names[0]), codes(names[1])
    nll, brier = numbers(names[2]), numbers(names[3])
    scored = tokens >= 0
    if (scored & (problem < 0)).any():
        raise ValueError(f"row {int(np.argmax(scored & (problem < 0)))} is scored but has no {names[0]}")
    first = first_with_same_tokens(problem, tokens)
    values = g_hat(nll[first], brier[first], problem)
    return [value if known else None for value, known in zip(values.tolist(), scored.tolist(), strict=True)]


def _columns(names: Sequence[str], problem: str) -> list[str]:
    """Names of the problem, the hash of the tokens, nll and the Brier score."""
    wanted = [problem, "token_hash", "nll", "brier_topk" if "brier_topk" in names else "brier"]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"no column {missing[0]!r}: add_g_hat comes after map(ScoreRows(...), batched=True)")
    return wanted


def _refuse_single_row(batch: Mapping[str, Any], names: Sequence[str]) -> None:
    """Without ``batched=True`` the values are those of one row, and messages would be taken for rows."""
    for name in names:
        first = next(iter(batch[name]), None) if isinstance(batch[name], list | tuple) else batch[name]
        is_row = {"messages": dict, "conversations": dict, "prompt": dict, "input_ids": int, "labels": int}.get(name)
        if isinstance(batch[name], str) or (is_row is not None and isinstance(first, is_row)):
            raise ValueError("ScoreRows scores batches of rows: dataset.map(..., batched=True)")


def _thread_by_thread() -> None:
    """In a forked process OpenMP waits for ever for the threads that its parent had, unless it needs none."""
    for name in ("multiprocess", "multiprocessing"):  # what ``datasets`` forks with; the standard library's
        module = sys.modules.get(name)
        if module and module.parent_process() is not None and module.get_start_method(allow_none=True) == "fork":
            import torch

            torch.set_num_threads(1)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _stamps(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of each file: what tells a student from a later one in the same place. None of a hub's."""
    files = sorted(file for file in directory.iterdir() if file.is_file()) if directory.is_dir() else ()
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
