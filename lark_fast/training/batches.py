"""Which trajectories a step takes, how they are cut into micro-batches, and what of a micro-batch reaches the head."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lark_fast.packing import length_batches
from lark_fast.training.data import TrainingSet

# Padded tokens of a micro-batch where the user does not say how many trajectories. A GPU needs many to be busy; on a
# CPU activations should stay in its cache: 2,048 train about twice as fast as 16,384.
GPU_TOKENS, CPU_TOKENS = 16384, 2048


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B trajectories padded on the right to T tokens, their last tokens left out: those predict nothing."""

    input_ids: Tensor  # [B, T]
    predicts: Tensor  # [S] positions in the flattened [B * T] whose next token is scored
    labels: Tensor  # [S] that next token
    token_weights: Tensor  # [S] float32: the factor of its nll


def global_batch(step: int, n: int, batch_size: int, seed: int) -> np.ndarray:
    """Rows of step 0, 1, ...: an epoch is a permutation of all n rows, cut in order; its last batch may be smaller."""
    epoch, position = divmod(step, steps_per_epoch(n, batch_size))
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return order[position * batch_size : (position + 1) * batch_size]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Global batches of an epoch."""
    return -(-n // batch_size)


def micro_batches(
    rows: np.ndarray, lengths: np.ndarray, size: int | None, device: torch.device
) -> Iterator[np.ndarray]:
    """Cut a batch into rows of similar length, longest first.

    Args:
        rows: ``[n]`` indices of trajectories.
        lengths: ``[N]`` tokens of every trajectory.
        size: trajectories of a micro-batch, or None for as many as fit the device's budget of tokens.
        device: where they will go.
    """
    if size is None:
        for batch in length_batches(lengths[rows].tolist(), CPU_TOKENS if device.type == "cpu" else GPU_TOKENS):
            yield rows[batch]
    else:
        ordered = rows[np.argsort(-lengths[rows], kind="stable")]
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]


def collate(data: TrainingSet, rows: np.ndarray, weights: np.ndarray, device: torch.device) -> MicroBatch:
    """Gather rows of the training set into one padded micro-batch on ``device``.

    Args:
        data: the training set.
        rows: ``[B]`` indices of trajectories.
        weights: ``[B]`` factor of every scored token of each.
        device: where the micro-batch goes.
    """
    lengths = data.lengths[rows] - 1  # [B]
    width = int(lengths.max())
    ids = np.zeros((len(rows), width), dtype=np.int64)
    predicts, labels = [], []
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = data.starts[row]
        tokens = data.ids[start : start + length + 1]
        ids[place, :length] = tokens[:-1]
        at = np.flatnonzero(data.scored[start + 1 : start + length + 1])
        predicts.append(place * width + at)
        labels.append(tokens[at + 1])
    return MicroBatch(
        input_ids=torch.from_numpy(ids).to(device),
        predicts=torch.from_numpy(np.concatenate(predicts)).to(device),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)).to(device),
        token_weights=torch.from_numpy(np.repeat(weights, data.n_scored[rows]).astype(np.float32)).to(device),
    )
