"""Training files -> token ids in a few flat arrays, with a weight for every trajectory."""

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lark_fast.errors import RejectError, UserError
from lark_fast.pool.reading import Pool, Rejected
from lark_fast.pool.records import NOT_SCORED, Record
from lark_fast.progress import track
from lark_fast.rendering.renderer import Renderer
from lark_fast.weights import checked_weight

SHOWN_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """N trajectories, one behind the other: 5 bytes a token."""

    ids: np.ndarray  # [tokens] int32
    scored: np.ndarray  # [tokens] bool: the token counts in the loss
    starts: np.ndarray  # [N + 1] int64: trajectory i is ids[starts[i] : starts[i + 1]]
    lengths: np.ndarray  # [N] int64, in tokens
    n_scored: np.ndarray  # [N] int64
    weights: np.ndarray  # [N] float64, > 0
    keys: Sequence[tuple[str, str]]  # [N] problem and candidate
    sources: Sequence[str]  # [N] the file each came from ...
    lines: np.ndarray  # [N] ... and its line there
    dropped: int  # rows of weight 0
    truncated: int

    def __len__(self) -> int:
        return len(self.weights)

    def hash(self) -> str:
        """SHA-256 over tokens, what is scored, and weights, in order."""
        total = hashlib.sha256()
        for part in (self.ids, self.scored, self.starts, self.weights):
            total.update(np.ascontiguousarray(part).data)
        return total.hexdigest()

    def labels(self, row: int) -> np.ndarray:
        """``[T_i]`` the trajectory's tokens where they are scored, else ``NOT_SCORED``."""
        span = slice(self.starts[row], self.starts[row + 1])
        return np.where(self.scored[span], self.ids[span], NOT_SCORED)

    def where(self, rows: Sequence[int]) -> str:
        """Name rows by file and line, for a message."""
        lines: dict[str, list[int]] = {}
        for row in sorted(rows)[:SHOWN_ROWS]:
            lines.setdefault(self.sources[row], []).append(int(self.lines[row]))
        named = "; ".join(f"{source} lines {', '.join(map(str, numbers))}" for source, numbers in lines.items())
        return named + (f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else "")


def load_training_set(path: str, renderer: Renderer, *, weighted: bool = True, quiet: bool = False) -> TrainingSet:
    """Read and render a training file.

    Args:
        path: file, directory or glob in any pool format.
        renderer: the student's.
        weighted: read the weights and drop rows of weight 0; otherwise every row weighs 1.
        quiet: another rank says what there is to say.

    Raises:
        UserError: a row that cannot be trained on, by file, line and reason; nothing to train on.
    """
    pool = Pool([path])
    ids, scored, starts = array("i"), bytearray(), array("q", [0])
    weights, lines, sources, keys = array("d"), array("q"), [], []
    dropped = truncated = 0
    any_weight, without = False, ""  # the first row that has none
    with track("reading", pool.total_bytes) as progress:
        for record in pool.read():
            try:
                if isinstance(record, Rejected):
                    raise RejectError(record.reason)
                weight = _weight(record) if weighted else None
                any_weight |= weight is not None
                if weighted and weight is None and not without:
                    without = f"{record.source}:{record.line}"
                weight = 1.0 if weight is None else weight
                if weight == 0:
                    dropped += 1
                    continue
                rendered = renderer(record)
            except RejectError as error:
                raise UserError(f"{record.source}:{record.line}: {error}") from error
            if any_weight and without:
                raise UserError(f"{without}: this row has no weight where others have one; give all one, or none")
            ids.extend(rendered.input_ids)
            scored.extend(label != NOT_SCORED for label in rendered.labels)
            starts.append(len(ids))
            weights.append(weight)
            lines.append(record.line)
            sources.append(record.source)
            keys.append(_key(record))
            truncated += rendered.truncated
            progress.update(pool.bytes_read, f"{len(weights):,} trajectories")
    if weighted and weights and not any_weight and not quiet:
        print(f"lark-fast: {path}: no row has a weight, so every trajectory counts alike", file=sys.stderr)
    if not weights:
        raise UserError(f"{path}: no trajectory to train on{f' ({dropped} rows have weight 0)' if dropped else ''}")
    flags, borders = np.frombuffer(scored, dtype=np.bool_), np.array(starts)
    return TrainingSet(
        ids=np.frombuffer(ids, dtype=np.int32),
        scored=flags,
        starts=borders,
        lengths=np.diff(borders),
        n_scored=np.add.reduceat(flags, borders[:-1], dtype=np.int64),
        weights=np.array(weights),
        keys=keys,
        sources=sources,
        lines=np.array(lines),
        dropped=dropped,
        truncated=truncated,
    )


def _weight(record: Record) -> float | None:
    """The root ``weight``, else ``meta.train_weight``, else None."""
    meta = record.extra.get("meta")
    if "weight" in record.extra:
        name, value = "weight", record.extra["weight"]
    elif isinstance(meta, dict) and "train_weight" in meta:
        name, value = "meta.train_weight", meta["train_weight"]
    else:
        return None
    return checked_weight(value, name)


def _key(record: Record) -> tuple[str, str]:
    """Problem and candidate: by ``meta`` in a selection, else as any pool's record."""
    meta = record.extra.get("meta")
    own = meta if isinstance(meta, dict) else {}
    return str(own.get("problem_id", record.problem_id)), str(own.get("candidate_id", record.candidate_id))
