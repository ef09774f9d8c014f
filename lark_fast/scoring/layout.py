"""How trajectories are laid out for the device: which of them share a pass, and what that pass reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lark_fast.batch import Batch, Sequences, make_batch, make_reading
from lark_fast.packing import length_batches, packs
from lark_fast.past import Past


@dataclass(slots=True, kw_only=True)
class Layout:
    """What decides how passes are put together; the same wherever they run.

    Attributes:
        packed: sequences share a row.
        border: see ``packs``.
        tokens_per_batch: the most tokens of a pass; halved where a device's memory does not suffice.
        pinned: in memory that a GPU fetches by itself.
        one_shape: packs are filled up, so that compiled layers see one shape.
    """

    packed: bool
    border: int | None
    tokens_per_batch: int
    pinned: bool = False
    one_shape: bool = False

    def plan(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which sequences share a pass, as indices."""
        group = packs if self.packed else length_batches
        return list(group(lengths, self.tokens_per_batch, self.border))

    def prepare(self, members: Sequence[Any], sequences: Sequences, pasts: Sequence[Past] | None = None) -> Batch:
        """What one pass reads; ``members`` are what the caller calls the sequences, ``pasts`` as in ``Batch``."""
        return make_batch(
            members,
            sequences,
            packed=self.packed,
            pinned=self.pinned,
            fill_to=self.tokens_per_batch if self.one_shape else 0,
            pasts=pasts,
        )

    def reading(
        self, members: Sequence[Any], hidden: Sequence[Sequence[Tensor]], words: Sequence[NDArray[np.int64]]
    ) -> Batch:
        """A pass of the head alone, see ``make_reading``."""
        return make_reading(members, hidden, words, pinned=self.pinned)

    def split(self, batch: Batch) -> list[Batch]:
        """A batch that has become too large, in several."""
        return [
            self.prepare(
                [batch.members[i] for i in group],
                [batch.sequences[i] for i in group],
                None if batch.pasts is None else [batch.pasts[i] for i in group],
            )
            for group in self.plan(batch.lengths)
        ]
