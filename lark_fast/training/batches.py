"""Which trajectories a step takes, how they are cut into micro-batches, and which rank takes which of them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lark_fast.batch import Batch, make_batch
from lark_fast.packing import length_batches, packs
from lark_fast.pool.records import NOT_SCORED
from lark_fast.training.data import TrainingSet

# Tokens of a micro-batch where the user does not say. A GPU needs many to be busy; on a CPU activations should stay in
# its cache.
GPU_TOKENS, CPU_TOKENS = 16384, 2048


def global_batch(step: int, n: int, batch_size: int, seed: int) -> np.ndarray:
    """Rows of step 0, 1, ...: an epoch is a permutation of all n rows, cut in order; its last batch may be smaller."""
    epoch, position = divmod(step, steps_per_epoch(n, batch_size))
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return order[position * batch_size : (position + 1) * batch_size]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Global batches of an epoch."""
    return -(-n // batch_size)


def default_tokens(device: torch.device) -> int:
    """Tokens of a micro-batch on this kind of device."""
    return CPU_TOKENS if device.type == "cpu" else GPU_TOKENS


def micro_batches(
    rows: np.ndarray,
    lengths: np.ndarray,
    *,
    size: int | None,
    tokens: int,
    packed: bool,
    border: int | None = None,
    ranks: int = 1,
) -> list[np.ndarray]:
    """Cut a batch into the rows of one forward pass each; the objective does not depend on how.

    Args:
        rows: ``[n]`` indices of trajectories.
        lengths: ``[N]`` tokens of every trajectory.
        size: trajectories of a micro-batch, or None for as many as fit ``tokens``.
        tokens: of a micro-batch; a longer trajectory is one of its own.
        packed: they will lie in one row; else a row each, padded to the longest.
        border: lengths on its two sides never share a micro-batch, see ``lark_fast.packing.packs``.
        ranks: the work is to be cut into at least so many parts where it can be.
    """
    if size is not None:
        return list(_of_size(rows[np.argsort(-lengths[rows], kind="stable")], lengths, size, border))
    own = lengths[rows].tolist()
    if ranks > 1:
        tokens = min(tokens, max(max(own), -(-sum(own) // ranks)))
    group = packs if packed else length_batches
    return [rows[batch] for batch in group(own, tokens, border)]


def _of_size(rows: np.ndarray, lengths: np.ndarray, size: int, border: int | None) -> Iterator[np.ndarray]:
    """Neighbours in length, longest first."""
    longer = 0 if border is None else int((lengths[rows] > border).sum())
    for part in (rows[:longer], rows[longer:]):
        for start in range(0, len(part), size):
            yield part[start : start + size]


def of_rank(batches: Sequence[np.ndarray], lengths: np.ndarray, rank: int, ranks: int) -> list[np.ndarray]:
    """The micro-batches of one rank: as many on each, and about as many tokens; some may be empty.

    Args:
        batches: those of all ranks.
        lengths: ``[N]`` tokens of every trajectory.
        rank: whose.
        ranks: how many there are.
    """
    order = sorted(range(len(batches)), key=lambda i: (-int(lengths[batches[i]].sum()), i))
    own = []
    for start in range(0, len(order), ranks):
        turn = order[start : start + ranks]
        # To and fro, so that no rank always gets the largest.
        place = rank if start // ranks % 2 == 0 else ranks - 1 - rank
        own.append(batches[turn[place]] if place < len(turn) else np.zeros(0, dtype=np.int64))
    return own


def collate(data: TrainingSet, rows: np.ndarray, *, packed: bool, pinned: bool, fill_to: int = 0) -> Batch:
    """Lay out rows ``[m]`` of the training set for a forward pass; arguments as in ``make_batch``.

    No rows make a pass that scores nothing: a rank without work takes part in what all ranks do.
    """
    sequences = [(data.ids[data.starts[row] : data.starts[row + 1]], data.labels(row)) for row in rows]
    if not sequences:
        sequences = [(np.zeros(1, dtype=np.int64), np.full(1, NOT_SCORED))]
    return make_batch(rows.tolist(), sequences, packed=packed, pinned=pinned, fill_to=fill_to)
