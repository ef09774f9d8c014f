"""``token_stats`` where the output embedding is cut by words over the ranks of a process group (vocabulary-parallel).

Every rank holds the same hidden states and its own words. The rank that has a label's word tells its logit to all; then
each takes its words into the sums of softmax_sums.py, and what travels is six numbers a token, whatever V is (with
``top_k``, so many more). All ranks merge the same numbers in the same order, so all hold the same bits.
"""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lark_fast.kernels import dispatch, token_stats_torch
from lark_fast.kernels.head import Head
from lark_fast.kernels.head_operands import (
    IGNORE_INDEX,
    check_operands,
    check_top_k,
    count_scored,
    for_kernels,
    keep_in_range,
    mark_ignored,
)
from lark_fast.kernels.softmax_sums import STATISTICS, TokenStats, Wanted, merge
from lark_fast.kernels.token_stats import form


@torch.no_grad()
def token_stats_vocab_parallel(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    top_k: int | None = None,
    statistics: Collection[str] = STATISTICS,
    ignore_index: int = IGNORE_INDEX,
    impl: str = "auto",
    sizes: Sequence[int] | None = None,
) -> TokenStats:
    """The statistics of ``token_stats`` for a weight whose words are spread over ranks, in their order.

    Called by every rank of the group with the same ``hidden``, ``labels`` and ``rows``; all get the whole result.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V_r, D]``, the words of this rank; ranks may hold different numbers of them, at least one each.
        labels: ``[T]`` int64 in [0, sum of V_r), or ``ignore_index``, which gives NaN.
        group: the process group; None: the default one.
        rows: as in ``token_stats``.
        bias: ``[V_r]``, of this rank's words.
        softcap, logit_scale, statistics, ignore_index, impl: as in ``token_stats``.
        top_k: as in ``token_stats``; it takes the form in plain torch.
        sizes: how many words each rank holds, where that is known: otherwise they are asked, and a GPU waited for.

    Raises:
        ValueError: as ``token_stats``.
    """
    if sizes is None:
        sizes = _gathered(labels.new_tensor([len(weight)]), group).flatten().tolist()
    ends = list(itertools.accumulate(sizes, initial=0))
    head, wanted = Head(weight, bias, softcap, logit_scale), Wanted.of(statistics)
    check_operands(hidden, head, labels, rows)
    check_top_k(top_k)
    if rows is None or not hidden.is_cuda:
        count_scored(labels, ends[-1], ignore_index)
    label_logits, partial_sums, finish = form(name := "torch" if top_k else dispatch.head_form(impl, hidden, weight))
    labels = mark_ignored(labels, ignore_index)
    if rows is not None:
        rows, labels = keep_in_range(rows, labels, len(hidden))
    known = (labels >= 0) & (labels < ends[-1])
    own_labels = labels - ends[dist.get_rank(group)]  # out of [0, V_r) where the word is another's
    if name != "torch":
        hidden, rows, head, own_labels = for_kernels(hidden, rows, head, own_labels)
    with torch.cuda.device_of(hidden):
        here = (own_labels >= 0) & (own_labels < len(weight))
        label_logit = label_logits(hidden, rows, head, own_labels).masked_fill(~here, 0.0)
        dist.all_reduce(label_logit, group=group)
        label_logit.masked_fill_(~known, float("nan"))
        if top_k is None:
            own = merge(partial_sums(hidden, rows, head, own_labels, label_logit, wanted))
            return finish(_gathered(own, group), label_logit, wanted)
        own, largest = token_stats_torch.sums_and_largest(hidden, rows, head, own_labels, label_logit, wanted, top_k)
        partials = _gathered(own, group)
        stats = finish(partials, label_logit, wanted)
        largest = _gathered(largest, group).transpose(0, 1).flatten(1).topk(top_k, dim=1, sorted=False).values
        of_k = token_stats_torch.brier_topk(largest, merge(partials), label_logit, top_k)
        return replace(stats, brier_topk=of_k.masked_fill(stats.nll.isnan(), math.nan))


def _gathered(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's tensor of one shape ``[...]`` -> ``[ranks, ...]``."""
    everyone = own.new_empty(dist.get_world_size(group), *own.shape)
    dist.all_gather(list(everyone), own.contiguous(), group=group)
    return everyone
