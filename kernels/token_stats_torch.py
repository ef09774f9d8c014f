"""The head in plain torch: one bounded block of logits at a time, for CPUs and wherever Triton is not.

Formulas: softmax_sums.py.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lark_fast.kernels.head import Head, accumulation_dtype
from lark_fast.kernels.softmax_sums import LOWEST, TokenStats, Wanted, brier_score, concatenate, finish, move

# A block of logits is [rows, words] float32: small enough to stay in a CPU's cache while the statistics read it, large
# enough for the matmul to run at full speed (docs/log.md).
CPU_BLOCK = (512, 4096)
GPU_BLOCK = (4096, 16384)
GROUP = 16  # words of which the top-k search looks at the maximum first
LOG2_E = math.log2(math.e)


def statistics(
    hidden: Tensor, rows: Tensor | None, head: Head, labels: Tensor, wanted: Wanted, top_k: int | None
) -> TokenStats:
    """Statistics of labels ``[T]`` predicted from rows (all, where None) of hidden ``[N, D]``."""
    parts = []
    for part, label in _row_blocks(hidden, rows, labels):
        label_logit = _label_logits(part, head, label)
        walk = _Walk(label_logit, label, wanted, top_k)
        _walk_head(walk, part, head)
        parts.append(walk.finish())
    return concatenate(parts)


def from_logits(logits: Tensor, labels: Tensor, wanted: Wanted, top_k: int | None) -> TokenStats:
    """Statistics of labels ``[T]`` under logits ``[T, V]`` that exist."""
    dtype = accumulation_dtype(logits.dtype)
    block_rows, block_words = _block(logits)
    parts = []
    for part, label in zip(logits.split(block_rows), labels.split(block_rows), strict=True):
        known = (label >= 0) & (label < logits.shape[1])
        own = part.gather(1, label.where(known, 0).unsqueeze(1)).squeeze(1).to(dtype)
        walk = _Walk(own.masked_fill(~known, math.nan), label, wanted, top_k)
        for start in range(0, logits.shape[1], block_words):
            walk.add(part[:, start : start + block_words].to(dtype, copy=True), start)
        parts.append(walk.finish())
    return concatenate(parts)


def label_logits(hidden: Tensor, rows: Tensor | None, head: Head, labels: Tensor) -> Tensor:
    """``[T]`` logits of the labels, NaN where a label is no word."""
    return torch.cat([_label_logits(part, head, label) for part, label in _row_blocks(hidden, rows, labels)])


def partial_sums(
    hidden: Tensor, rows: Tensor | None, head: Head, labels: Tensor, label_logit: Tensor, wanted: Wanted
) -> Tensor:
    """Sums over the words that are not the label -> ``[1, 5, T]``."""
    parts = []
    logits = label_logit.split(_block(hidden)[0])
    for (part, label), own in zip(_row_blocks(hidden, rows, labels), logits, strict=True):
        walk = _Walk(own, label, wanted, None)
        _walk_head(walk, part, head)
        parts.append(walk.sums)
    return torch.cat(parts, 1).unsqueeze(0)


def sums_and_largest(
    hidden: Tensor, rows: Tensor | None, head: Head, labels: Tensor, label_logit: Tensor, wanted: Wanted, top_k: int
) -> tuple[Tensor, Tensor]:
    """What ``brier_topk`` takes: the sums of ``partial_sums``, ``[5, T]``, with the count in any case, and the
    ``top_k`` largest logits of the words that are not the label ``[T, top_k]``, LOWEST where there are fewer."""
    sums, largest = [], []
    logits = label_logit.split(_block(hidden)[0])
    for (part, label), own in zip(_row_blocks(hidden, rows, labels), logits, strict=True):
        walk = _Walk(own, label, wanted, top_k)
        _walk_head(walk, part, head)
        sums.append(walk.sums)
        largest.append(pad(walk.largest, (0, top_k - walk.largest.shape[1]), value=LOWEST))
    return torch.cat(sums, 1), torch.cat(largest)


def brier_topk(largest: Tensor, sums: Tensor, label_logit: Tensor, top_k: int) -> Tensor:
    """The k largest logits are the label and k - 1 others where the label's rank allows, else k others.

    Args:
        largest: ``[T, <= k]`` the largest logits of the words that are not the label, or all of them.
        sums: ``[5, T]``, see softmax_sums.py.
        label_logit: ``[T]``.
        top_k: k.
    """
    inside = sums[4] < top_k
    m = torch.maximum(sums[0], label_logit)
    e = (largest.sort(1, descending=True).values - m.unsqueeze(1)).exp()
    e[:, top_k - 1 :].masked_fill_(inside.unsqueeze(1), 0.0)
    a = (label_logit - m).exp()
    s1, s2 = e.sum(1), (e * e).sum(1)
    return torch.where(inside, brier_score(s1, s2, a), 1.0 + s2 / (s1 * s1))


def _block(tensor: Tensor) -> tuple[int, int]:
    return GPU_BLOCK if tensor.is_cuda else CPU_BLOCK


def _row_blocks(hidden: Tensor, rows: Tensor | None, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and labels, a block of rows at a time; one empty block where there is no row."""
    block_rows, _ = _block(hidden)
    for start in range(0, max(1, len(labels)), block_rows):
        block = slice(start, start + block_rows)
        yield hidden[block] if rows is None else hidden[rows[block]], labels[block]


def _label_logits(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    known = (labels >= 0) & (labels < len(head.weight))
    return head.label_logits(hidden, labels.where(known, 0)).masked_fill(~known, math.nan)


def _walk_head(walk: "_Walk", hidden: Tensor, head: Head) -> None:
    """Take every word's logits of some rows of hidden states ``[T, D]`` into ``walk``."""
    _, block_words = _block(hidden)
    buffer = hidden.new_empty(len(hidden) * block_words, dtype=accumulation_dtype(hidden.dtype))
    for start in range(0, len(head.weight), block_words):
        words = head.columns(start, start + block_words)
        out = buffer[: len(hidden) * len(words.weight)].view(len(hidden), -1) if len(hidden) else None
        walk.add(words.logits(hidden, out), start)


class _Walk:
    """Running sums of some rows over blocks of columns; the label's own column never enters them."""

    def __init__(self, label_logit: Tensor, labels: Tensor, wanted: Wanted, top_k: int | None) -> None:
        self.label_logit, self.labels = label_logit.unsqueeze(1), labels.unsqueeze(1)  # [T, 1] each
        self.wanted, self.top_k = wanted, top_k
        self.sums = label_logit.new_zeros(5, len(labels))  # m, S1', S2', SZ', count
        self.sums[0] = LOWEST
        self.largest = self.label_logit.new_empty(len(labels), 0)  # [T, <= k] the k largest logits of v != y

    def add(self, z: Tensor, start: int) -> None:
        """Take in the logits of columns start, start + 1, ...: ``[T, C]``, overwritten."""
        column = (self.labels - start).clamp(0, z.shape[1] - 1)
        here = column == self.labels - start
        z.scatter_(1, column, z.gather(1, column).masked_fill_(here, LOWEST))
        z.clamp_(min=LOWEST)
        if self.top_k is not None:
            self._keep_largest(z)
        self.sums = move(self.sums, torch.maximum(self.sums[0], z.amax(1)))
        m, s1, s2, sz, count = self.sums
        e = torch.empty_like(z)
        if self.wanted.rank or self.top_k is not None:
            count += torch.gt(z, self.label_logit, out=e).sum(1)
        z.sub_(m.unsqueeze(1))
        torch.mul(z, LOG2_E, out=e).exp2_()  # torch's exp2 takes half the time of its exp on a CPU
        s1 += e.sum(1)
        if self.wanted.brier:
            s2 += torch.linalg.vector_norm(e, dim=1).square()
        if self.wanted.entropy:
            sz += z.mul_(e).sum(1)

    def finish(self) -> TokenStats:
        label_logit = self.label_logit.squeeze(1)
        stats = finish(self.sums.unsqueeze(0), label_logit, self.wanted)
        if self.top_k is None:
            return stats
        of_k = brier_topk(self.largest, self.sums, label_logit, self.top_k)
        return replace(stats, brier_topk=of_k.masked_fill(stats.nll.isnan(), math.nan))

    def _keep_largest(self, z: Tensor) -> None:
        """Merge a block into the k largest logits so far, and look at few of its logits to do so.

        Split the columns into groups. Where k groups have a maximum that is at least some logit's, that logit is not
        needed; so the k largest are in the k groups with the largest maxima, and once k are known, in those groups
        whose maximum exceeds the smallest of them.
        """
        if len(z) == 0:
            return
        n_groups = z.shape[1] // GROUP
        groups = z[:, : n_groups * GROUP].unflatten(1, (GROUP, n_groups))  # [T, GROUP, n]; a group's columns lie apart
        maxima = groups.amax(1)
        wanted = min(self.top_k, n_groups)
        if self.largest.shape[1] == self.top_k:
            wanted = min(wanted, int((maxima > self.largest.amin(1, keepdim=True)).sum(1).max()))
        best = maxima.topk(wanted, dim=1, sorted=False).indices.unsqueeze(1).expand(-1, GROUP, -1)
        candidates = torch.cat([self.largest, groups.gather(2, best).flatten(1), z[:, n_groups * GROUP :]], 1)
        self.largest = candidates.topk(min(self.top_k, candidates.shape[1]), dim=1, sorted=False).values
