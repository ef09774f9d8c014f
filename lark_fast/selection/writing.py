"""Files of a selection: train.jsonl, and weights.parquet, which needs no text."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark_fast.files import atomic_open, atomic_path
from lark_fast.pool.records import Record
from lark_fast.selection.exporters import Exporter
from lark_fast.selection.first_pass import Removed
from lark_fast.selection.hygiene.removals import removed_entry
from lark_fast.selection.scored_rows import ScoredRows
from lark_fast.selection.weighing import Weighed

RESERVED_COLUMNS = frozenset({"messages", "input_ids", "labels", "weight", "meta"})

_WEIGHTS = pa.schema(
    [(name, pa.string()) for name in ("problem_id", "candidate_id", "teacher", "source")]
    + [("n_tokens", pa.int32()), ("g_hat", pa.float64()), ("weight", pa.float64())]
)


def training_row(record: Record, weight: float, g_hat: float) -> dict[str, Any]:
    """The line of train.jsonl for a record; columns of the pool travel along, but for RESERVED_COLUMNS."""
    if record.messages is not None:
        line: dict[str, Any] = {"messages": record.messages}
    else:
        line = {"input_ids": record.input_ids, "labels": record.labels}
    line["weight"] = weight
    line["meta"] = {
        "problem_id": record.problem_id,
        "candidate_id": record.candidate_id,
        "teacher": record.teacher,
        "g_hat": g_hat,
        "train_weight": weight,
    }
    return line | {name: value for name, value in record.extra.items() if name not in RESERVED_COLUMNS}


class TrainFiles:
    """What one pass over the pool writes: train.jsonl of each of some selections, their exports, and removed.jsonl.

    A context: the files appear when it is left without an error.

    Args:
        rows: with the g_hat to write.
        selections: by directory.
        exports: names of formats, see exporters.py.
        removed: the file that tells what filters took out, and this; None without filters.
    """

    def __init__(
        self,
        rows: ScoredRows,
        selections: Mapping[Path, Weighed],
        exports: Sequence[str] = (),
        removed: tuple[Path, Removed] | None = None,
    ) -> None:
        self._rows, self._selections, self._removed = rows, selections, removed
        self._why_removed = (lambda row: None) if removed is None else removed[1].asked_in_order()
        self._exporters = {
            directory: [Exporter(name, directory, float(weighed.weight.mean())) for name in exports]
            for directory, weighed in selections.items()
            if len(weighed.rows)
        }
        self._stack = ExitStack()
        self.columns_left_out: set[str] = set()

    def __enter__(self) -> "TrainFiles":
        with ExitStack() as stack:
            self._outs = []
            for directory, weighed in self._selections.items():
                directory.mkdir(parents=True, exist_ok=True)
                chosen = np.zeros(len(self._rows), dtype=bool)
                chosen[weighed.rows] = True
                file = stack.enter_context(atomic_open(directory / "train.jsonl"))
                exporters = [stack.enter_context(exporter) for exporter in self._exporters.get(directory, ())]
                self._outs.append((chosen, weighed, file, exporters))
            if self._removed is not None:
                self._removed_file = stack.enter_context(atomic_open(self._removed[0]))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, row: int, record: Record) -> None:
        """Write a record, in the pool's order, to the files of selections that chose it or to that of the removed."""
        removal = self._why_removed(row)
        if removal is not None:
            _write_line(self._removed_file, removed_entry(record, removal))
            return
        for chosen, weighed, file, exporters in self._outs:
            if chosen[row]:
                weight = float(weighed.weight[weighed.rows.searchsorted(row)])
                line = training_row(record, weight, float(self._rows.numbers["g_hat"][row]))
                _write_line(file, line)
                for exporter in exporters:
                    exporter.write(line)
                self.columns_left_out |= record.extra.keys() & RESERVED_COLUMNS

    def notes(self, directory: Path) -> tuple[str, ...]:
        """What a reader should know of a selection's exports."""
        return tuple(note for exporter in self._exporters.get(directory, ()) for note in exporter.notes())


def _write_line(file: IO[str], value: Any) -> None:
    file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def write_weights(rows: ScoredRows, selections: Mapping[Path, Weighed]) -> None:
    """Write weights.parquet of each selection: a line a chosen trajectory, in the order of the scores."""
    with ExitStack() as stack:
        writers = []
        for directory in selections:
            directory.mkdir(parents=True, exist_ok=True)
            path = stack.enter_context(atomic_path(directory / "weights.parquet"))
            writers.append(stack.enter_context(pq.ParquetWriter(path, _WEIGHTS, compression="zstd")))
        start = 0
        names = [name for name in _WEIGHTS.names if name not in ("g_hat", "weight")]
        for batch in rows.batches(*names):
            for writer, weighed in zip(writers, selections.values(), strict=True):
                first, last = weighed.rows.searchsorted((start, start + len(batch)))
                if first < last:
                    chosen = weighed.rows[first:last]
                    columns = [
                        batch[name].take(pa.array(chosen - start)).cast(_WEIGHTS.field(name).type) for name in names
                    ]
                    numbers = [pa.array(rows.numbers["g_hat"][chosen]), pa.array(weighed.weight[first:last])]
                    writer.write_table(pa.table([*columns, *numbers], schema=_WEIGHTS))
            start += len(batch)
