"""Draws that do not depend on who else is in the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

_LIKELIEST = 64  # tokens looked at first: with most texts they hold more than any top-p


class TopP(LogitsProcessor):
    """Keeps of each row the likeliest tokens that reach a probability together, at least one (Holtzman et al. 2020).

    The same tokens as Transformers' ``TopPLogitsWarper`` keeps, without sorting the vocabulary.

    Args:
        top_p: above 0 and at most 1.
    """

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` ``[B, V]`` float32, -inf where a token is left out."""
        total = scores.logsumexp(dim=-1, keepdim=True)
        count = min(_LIKELIEST, scores.shape[-1])
        while True:
            best, places = scores.topk(count, dim=-1)
            shares = (best - total).exp()
            reached = shares.cumsum(dim=-1)
            if count == scores.shape[-1] or bool((reached[:, -1] >= self.top_p).all()):
                break
            count = min(8 * count, scores.shape[-1])
        likelier = reached - shares  # what the tokens before have together
        kept = best.masked_fill(likelier >= self.top_p, -torch.inf)
        kept[:, 0] = best[:, 0]
        return torch.full_like(scores, -torch.inf).scatter_(-1, places, kept)


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
