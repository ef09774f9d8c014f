"""Batches that know the factor of every token and how many trajectories they hold."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lark_fast.trainers.weighting import FACTORS, NOT_SCORED

TRAJECTORIES, EXAMPLE = "n_trajectories", "example"
LAID_OUT = ("input_ids", "labels", "seq_lengths")  # what the collator underneath is given


class WeightedCollator:
    """Any collator that keeps the order of tokens, padded or flattened, with the weights put beside its labels.

    Adds ``token_weights`` and ``example`` (which of the batch's B dataset rows a token is of), both ``[b, T]`` as
    ``input_ids``, and ``n_trajectories`` ``[B]``: above 1 where a row is a pack.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Raises:
            ValueError: rows without factors, or a collator that adds, drops or masks tokens.
        """
        if FACTORS not in examples[0]:
            raise ValueError("rows without token_weights: give the dataset to the trainer's constructor or to evaluate")
        batch = dict(self.collator([{k: e[k] for k in LAID_OUT if k in e} for e in examples]))
        lengths = torch.tensor([len(e["input_ids"]) for e in examples])
        factors = torch.tensor(list(chain.from_iterable(e[FACTORS] for e in examples)), dtype=torch.float32)
        batch[FACTORS] = _lay_out(factors, batch)
        batch[EXAMPLE] = _lay_out(torch.arange(len(examples)).repeat_interleave(lengths), batch)
        batch[TRAJECTORIES] = torch.tensor([len(e.get("seq_lengths", (1,))) for e in examples])
        scored = batch["labels"] != NOT_SCORED
        scored[:, 0] = False  # a label that nothing predicts
        if not torch.equal(scored, batch[FACTORS] != 0):
            raise ValueError("the collator scores other tokens than the dataset's labels: mask labels in the dataset")
        return batch


def _lay_out(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """One value a token, in order, where the collator has put that token; 0 at padding."""
    placed = torch.zeros(batch["input_ids"].shape, dtype=values.dtype)
    where = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(placed, dtype=torch.bool)
    if "attention_mask" not in batch:
        where.flatten()[len(values) :] = False  # pad_to_multiple_of, behind the last token
    if int(where.sum()) != len(values):
        raise ValueError(f"the collator makes {int(where.sum())} tokens of {len(values)}")
    placed[where] = values
    return placed


def pad_right(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of one length ``[B, T]``, whatever the tokenizer's padding: no token sees what lies behind it."""
    ids = [torch.as_tensor(e["input_ids"]) for e in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence([torch.as_tensor(e["labels"]) for e in examples], True, NOT_SCORED),
    }
