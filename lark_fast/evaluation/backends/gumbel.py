"""Draws that do not depend on who else is in the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class GumbelNoise(LogitsProcessor):
    """Adds to each row Gumbel noise from the row's own generator.

    The largest of logits + Gumbel noise is a draw from softmax(logits) (Gumbel 1954), so greedy decoding behind this is
    sampling; and as every answer has its own numbers, it is the same answer, up to rounding, in any batch, before and
    after a run was stopped.

    Args:
        generators: one a row of the batch, on its device.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = list(generators)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` ``[B, V]`` float32 with noise."""
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log_()
