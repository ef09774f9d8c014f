"""Statistics of tokens in plain torch, every logit at once: the peer of the head and of the scorer.

``eager_topk`` gives what LARK's released scorer gives, nll and top-k Brier; ``eager_exact`` what ``token_stats`` gives,
``eager_nll_brier`` the cheaper half of it. ``eager_stats`` is all of them, for a comparison of errors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lark_fast.kernels.softmax_sums import TokenStats


def eager_topk(logits: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """``logits`` [T, V], ``labels`` [T] -> nll [T] and the Brier score over the ``top_k`` largest logits [T]."""
    logits = logits.float()
    nll = F.cross_entropy(logits, labels, reduction="none")
    largest, words = logits.topk(top_k, dim=1)
    p = largest.softmax(1)
    p_label = p.masked_fill(words != labels.unsqueeze(1), 0.0).sum(1)
    return nll, 1.0 - 2.0 * p_label + p.square().sum(1)


def eager_nll_brier(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``logits`` [T, V], ``labels`` [T] -> nll and Brier score, ``[T]`` each."""
    label = labels.unsqueeze(1)
    log_p = logits.float().log_softmax(1)
    p = log_p.exp()
    brier = 1.0 - 2.0 * p.gather(1, label).squeeze(1) + p.square().sum(1)
    return -log_p.gather(1, label).squeeze(1), brier


def eager_exact(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``logits`` [T, V], ``labels`` [T] -> nll, Brier score, entropy and rank, ``[T]`` each."""
    logits = logits.float()
    label = labels.unsqueeze(1)
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    brier = 1.0 - 2.0 * p.gather(1, label).squeeze(1) + p.square().sum(1)
    rank = 1 + (logits > logits.gather(1, label)).sum(1)
    return -log_p.gather(1, label).squeeze(1), brier, -(p * log_p).sum(1), rank


def eager_stats(logits: Tensor, labels: Tensor, top_k: int | None) -> TokenStats:
    """``logits`` [T, V], ``labels`` [T] -> all statistics; broken rows are as they come."""
    nll, brier, entropy, rank = eager_exact(logits, labels)
    brier_topk = None if top_k is None else eager_topk(logits, labels, min(top_k, logits.shape[1]))[1]
    return TokenStats(nll, brier, entropy, rank, rank == 1, brier_topk)


def in_chunks(statistics, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, ...]:
    """The same, ``rows`` of ``hidden`` [T, D] at a time: no [T, V] logits."""
    parts = [
        statistics(part @ weight.T, label) for part, label in zip(hidden.split(rows), labels.split(rows), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
