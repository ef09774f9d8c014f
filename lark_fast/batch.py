"""What one forward pass reads: sequences laid out in a pack or in padded rows, on the host and on the device."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lark_fast.attention import Pack
from lark_fast.kernels.head_operands import IGNORE_INDEX
from lark_fast.past import PackedPast, Past, with_pasts

SEQUENCES_STEP = 64  # packs of one shape have a multiple of it as their number of bounds


class Targets(NamedTuple):
    """What is asked about a sequence where labels cannot say it: any words, at any of its positions."""

    rows: NDArray[np.int64]  # [N] positions in the sequence
    words: NDArray[np.int64]  # [N] token ids; positions up to and with rows[n] are what predicts words[n]
    drawn_from: int | None = None  # how many there are, where these are a sample of them, see ``head_sampling``

    @classmethod
    def of(cls, labels: ArrayLike) -> "Targets":
        """Of labels ``[T]`` as Transformers has them: position t predicts label t + 1."""
        words = np.asarray(labels, dtype=np.int64)[1:]
        rows = np.flatnonzero(words != IGNORE_INDEX)
        return cls(rows, words[rows])


# input_ids of each, and labels as long as they are or targets
Sequences = Sequence[tuple[ArrayLike, ArrayLike | Targets]]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one forward pass reads, on the host (pinned for a GPU).

    Attributes:
        members: what the caller calls the sequences, in the order in which they lie here.
        sequences: those sequences.
        lengths: tokens of each.
        shape: rows and columns of the input; one row where sequences are packed.
        bounds: of a pack: where the sequences lie, see ``Pack``. What fills the row up is a sequence more, and empty
            ones may follow. None: a row a sequence, padded on the right.
        numbers: int64, one behind another: input_ids and, of a pack, position_ids (both rows x columns) and ``bounds``;
            the rows of hidden states that are scored, and the words they predict (N each); where each sequence's
            scored tokens begin (S + 1).
        n_scored: N.
        pasts: of a pack: what each sequence goes on from, and leaves its own tokens in where it says so; None: they
            begin here, and leave nothing.
        hidden: hidden states that an earlier pass has made, a sequence's one behind another's, ``[n, D]`` each; the
            sequences have no tokens then, and the head alone is run. None: they are made here.
    """

    members: Sequence[Any]
    sequences: Sequences
    lengths: Sequence[int]
    shape: tuple[int, int]
    bounds: Sequence[int] | None
    numbers: Tensor
    n_scored: int
    pasts: Sequence[Past] | None = None
    hidden: Sequence[Tensor] | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of the sequences."""
        return sum(self.lengths)

    @property
    def n_padded(self) -> int:
        """Tokens that pass through the student for nothing."""
        return self.size - self.n_tokens

    @property
    def size(self) -> int:
        """Tokens that pass through the student."""
        return self.shape[0] * self.shape[1]

    def on(self, device: torch.device, head_device: torch.device | None = None) -> "Inputs":
        """The numbers on their device, by name; without a wait where they are pinned.

        Args:
            device: where the model reads its input.
            head_device: where the scored rows meet the head; None: the same.
        """
        n_inputs, n_bounds = self.size, len(self.bounds or ())
        sizes = [
            n_inputs,
            n_inputs if self.bounds else 0,
            n_bounds,
            self.n_scored,
            self.n_scored,
            len(self.lengths) + 1,
        ]
        ids, places, bounds, rows, targets, ends = self.numbers.to(device, non_blocking=True).split(sizes)
        rows, targets, ends = (part.to(head_device or device, non_blocking=True) for part in (rows, targets, ends))
        if self.bounds is None:
            hidden = None if self.hidden is None else torch.cat(list(self.hidden))
            return Inputs(ids.view(self.shape), None, None, rows, targets, ends, None, hidden)
        longest = max(end - start for start, end in itertools.pairwise(self.bounds))
        pack = Pack(self.bounds, bounds.to(torch.int32), longest)
        past = None
        if self.pasts is not None:
            pack = with_pasts(pack, self.pasts)
            past = PackedPast(self.pasts, pack)
        return Inputs(ids.view(self.shape), pack, places.view(self.shape), rows, targets, ends, past, None)


class Inputs(NamedTuple):
    """A batch on its device."""

    ids: Tensor  # [B, T]
    pack: Pack | None
    places: Tensor | None  # [1, T] position_ids of a pack
    rows: Tensor  # [N] of the hidden states
    targets: Tensor  # [N]
    ends: Tensor  # [S + 1]
    past: PackedPast | None
    hidden: Tensor | None  # [n, D] of the head alone


def make_batch(
    members: Sequence[Any],
    sequences: Sequences,
    *,
    packed: bool,
    pinned: bool,
    fill_to: int = 0,
    pasts: Sequence[Past] | None = None,
) -> Batch:
    """Lay out the sequences of one forward pass.

    Args:
        members: what the caller calls them.
        sequences: input_ids of each, and its labels or targets.
        packed: in one row; otherwise in a row each.
        pinned: in memory from which a GPU can fetch them by itself.
        fill_to: fill a pack up to so many tokens, so that all packs have one shape.
        pasts: see ``Batch``; the sequences are what comes behind them.
    """
    lengths = [len(ids) for ids, _ in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.concatenate([np.asarray(row, dtype=np.int64) for row, _ in sequences] or [starts[:0]])
    asked = [marks if isinstance(marks, Targets) else Targets.of(marks) for _, marks in sequences]
    rows = np.concatenate([start + own.rows for start, own in zip(starts, asked, strict=False)] or [starts[:0]])
    targets = np.concatenate([own.words for own in asked] or [starts[:0]])
    ends = np.concatenate([[0], np.cumsum([len(own.rows) for own in asked])]).astype(np.int64)
    bounds: list[int] | None = None
    if packed:
        shape = (1, max(1, int(starts[-1]), fill_to))
        bounds = starts.tolist()
        if fill_to:
            bounds += [shape[1]] * (SEQUENCES_STEP - len(bounds) % SEQUENCES_STEP)
        elif shape[1] > bounds[-1]:
            bounds.append(shape[1])
        firsts = [0] * len(lengths) if pasts is None else [past.length for past in pasts]
        places = np.arange(starts[-1]) - np.repeat(starts[:-1] - firsts, lengths)
        # What fills the row up is at place 0: its own places could lie beyond those that the model has.
        parts = [*(np.pad(part, (0, shape[1] - len(ids))) for part in (ids, places)), np.asarray(bounds)]
    else:
        shape = (len(sequences), max([1, *lengths]))
        moved = np.arange(len(sequences)) * shape[1] - starts[:-1]  # from its place among the tokens to its row
        square = np.zeros(shape[0] * shape[1], dtype=np.int64)
        square[np.arange(starts[-1]) + np.repeat(moved, lengths)] = ids
        rows = rows + np.repeat(moved, np.diff(ends))
        parts = [square]
    numbers = torch.from_numpy(np.concatenate([*parts, rows, targets, ends]))
    numbers = _pinned(numbers) if pinned else numbers
    return Batch(members, sequences, lengths, shape, bounds, numbers, len(rows), pasts)


def make_reading(
    members: Sequence[Any], hidden: Sequence[Sequence[Tensor]], words: Sequence[NDArray[np.int64]], *, pinned: bool
) -> Batch:
    """A pass of the head alone, over hidden states that an earlier pass has made.

    Args:
        members: what the caller calls the sequences.
        hidden: of each, ``[n, D]`` a pass that has made them.
        words: of each, ``[n]`` the words that they predict.
        pinned: see ``make_batch``.
    """
    counts = [len(own) for own in words]
    ends = np.cumsum([0, *counts])
    numbers = torch.from_numpy(np.concatenate([np.arange(ends[-1]), *words, ends]))
    sequences = [(words[0][:0], Targets(np.arange(len(own)), own)) for own in words]
    parts = [part for own in hidden for part in own]
    numbers = _pinned(numbers) if pinned else numbers
    return Batch(members, sequences, [0] * len(counts), (1, 0), None, numbers, int(ends[-1]), hidden=parts)


def _pinned(numbers: Tensor) -> Tensor:
    """In memory that a GPU can read by itself; as it is where there is none left, which is slower and no more."""
    try:
        return numbers.pin_memory()
    except RuntimeError:
        return numbers
