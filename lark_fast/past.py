"""What a sequence leaves behind when it passes through a student in pieces: the keys and values of its tokens.

A piece sees the pieces before it through them, so that a trajectory of which the first tokens have been scored goes on
where it stopped. Their order inside a pass is that of the pack: of each sequence, the earlier ones and then its own.

Hidden states stay where a head has passed over tokens that it may read later.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lark_fast.attention import Pack


class Past:
    """Keys and values of one sequence, of all layers, on the device.

    Attributes:
        length: of how many tokens.
        grows: the next tokens are to stay as well; else they are the last.
        keeps: of the next tokens, ``[n]``, those whose hidden states are to stay.
        kept: those that have, ``[n, D]`` a pass.
    """

    def __init__(self, grows: bool = True) -> None:
        self.length, self.grows = 0, grows
        self.keeps: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.kept: list[Tensor] = []
        self._layers: dict[int, list[tuple[Tensor, Tensor]]] = {}  # a piece each: [G, t, d] and [G, t, e]

    @property
    def n_bytes(self) -> int:
        """Of its keys and values."""
        return sum(part.nbytes for pieces in self._layers.values() for piece in pieces for part in piece)

    def of(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Those of a layer, piece by piece."""
        return self._layers.get(layer, [])

    def add(self, layers: dict[int, tuple[Tensor, Tensor]], n_tokens: int) -> None:
        """The next tokens of the sequence; takes no memory of the device, so that it never fails halfway."""
        for layer, new in layers.items():
            self._layers.setdefault(layer, []).append(new)
        self.length += n_tokens

    def clear(self) -> None:
        """Let go of the keys and values; the sequence goes on no more."""
        self._layers.clear()


class PackedPast:
    """The pasts of a pack's sequences, as Transformers' models take a cache: ``past_key_values``.

    Args:
        pasts: one a sequence.
        pack: of the tokens that are to come.
    """

    is_compileable = False
    is_sliding = (False,)

    def __init__(self, pasts: Sequence[Past], pack: Pack) -> None:
        self._pasts, self._pack = pasts, pack
        self._new: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in pasts]
        self._hidden: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer's new tokens, ``[1, G, T, d]``; returns all that these may see."""
        parts: list[tuple[Tensor, Tensor]] = []
        bounds = list(pairwise(self._pack.bounds))
        for past, new, (start, end) in zip(self._pasts, self._new, bounds, strict=False):
            own = key[0, :, start:end], value[0, :, start:end]
            parts += [*past.of(layer), own]
            if past.grows:  # a copy, or the whole pack would stay
                new[layer] = tuple(x.clone() for x in own)
        rest = bounds[len(self._pasts) :]  # what fills the pack up
        parts += [(key[0, :, start:end], value[0, :, start:end]) for start, end in rest]
        return tuple(torch.cat(of, 1).unsqueeze(0) for of in zip(*parts, strict=True))

    def get_seq_length(self, *_: Any) -> int:
        """Places are told to the model, so nothing follows from it."""
        return 0

    def keep(self, hidden: Tensor) -> None:
        """The hidden states of the pass, ``[1, T, D]``, of which some are to stay."""
        rows = [start + past.keeps for past, start in zip(self._pasts, self._pack.bounds, strict=False)]
        counts = [len(own) for own in rows]
        if any(counts):
            chosen = torch.from_numpy(np.concatenate(rows)).to(hidden.device, non_blocking=True)
            self._hidden = [own.clone() for own in hidden[0].index_select(0, chosen).split(counts)]

    def commit(self) -> None:
        """The pass has come to its end: the sequences have its tokens behind them."""
        for past, hidden in zip(self._pasts, self._hidden, strict=False):
            if len(hidden):
                past.kept.append(hidden)
        for past, new, (start, end) in zip(self._pasts, self._new, pairwise(self._pack.bounds), strict=False):
            if past.grows:
                past.add(new, end - start)
            else:
                past.clear()


def with_pasts(pack: Pack, pasts: Sequence[Past]) -> Pack:
    """The pack, whose sequences see the keys of their pasts too."""
    sizes = [end - start for start, end in pairwise(pack.bounds)]
    for place, past in enumerate(pasts):
        sizes[place] += past.length
    bounds = (0, *accumulate(sizes))
    device = pack.cu_seqlens.device
    keys = Pack(bounds, torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True), max(sizes, default=0))
    return Pack(pack.bounds, pack.cu_seqlens, pack.longest, keys)
