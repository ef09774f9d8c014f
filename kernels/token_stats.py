"""Per-token statistics of a student's predictions, straight from hidden states, without the [T, V] logits.

nll, Brier score, entropy, rank and agreement of every label; their formulas: softmax_sums.py, those of the logits:
head.py. Three forms give the same numbers (dispatch.py picks one):

    fused     one Triton kernel makes a tile of logits and takes it into the sums at once (token_stats_triton.py)
    chunked   the library's matrix product on a chunk of words, then a Triton kernel on its logits (logits_triton.py)
    torch     plain torch, a block of logits at a time (token_stats_torch.py)

``token_stats_naive`` is the plain definition, the truth of tests and benchmarks.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lark_fast.kernels import dispatch, softmax_sums, token_stats_torch
from lark_fast.kernels.head import Head, head_logits
from lark_fast.kernels.head_operands import (
    IGNORE_INDEX,
    along_rows,
    check_logits,
    check_operands,
    check_rows,
    check_top_k,
    count_scored,
    for_kernels,
    keep_in_range,
    mark_ignored,
)
from lark_fast.kernels.softmax_sums import STATISTICS, TokenStats, Wanted, concatenate

TOPK_LOGITS_BYTES = 256 << 20  # of float32 logits that top-k makes at a time


@torch.no_grad()
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    top_k: int | None = None,
    statistics: Collection[str] = STATISTICS,
    ignore_index: int = IGNORE_INDEX,
    impl: str = "auto",
) -> TokenStats:
    """Exact nll, Brier score, entropy, rank and agreement of every label, without the ``[T, V]`` logits.

    The result is the same, bit for bit, on every run, and carries no gradient: ``linear_cross_entropy`` is the loss.
    Autocast has no say here. On a GPU with ``rows`` given, the Triton forms read nothing back and nothing waits: a row
    or label out of range then gives NaN where it otherwise raises.

    A word whose logit equals the label's does not count against its rank. In the fused form that holds for words with
    the label's very weights too; the other forms sum the two logits in different ways, and rounding decides.

    Args:
        hidden: ``[N, D]`` inputs of the output embedding, float32, bfloat16, float16 or (in torch) float64.
        weight: ``[V, D]`` output embedding.
        labels: ``[T]`` int64 or int32 in [0, V), or ``ignore_index``. Nothing is shifted: a causal model's row t is
            given ``input_ids[t + 1]``.
        rows: ``[T]`` int64 or int32, the row of ``hidden`` that predicts each label: the fused form scores them where
            they lie. None: row t predicts ``labels[t]``, T = N.
        bias: ``[V]`` or None.
        softcap: cap of the logits (Gemma-2), or None.
        logit_scale: factor on the logits (Cohere; 1 / Granite's ``logits_scaling``), or None.
        top_k: also give ``brier_topk`` over the ``top_k`` largest logits (LARK's released code uses 50). A label that
            ties with the k-th largest logit counts as one of the k. It has no fused form: blocks of at most 256 MiB of
            logits are made.
        statistics: names out of "nll", "brier", "entropy", "rank"; what is left out is None and costs nothing. nll and
            agreement always come.
        ignore_index: label of rows to leave out.
        impl: "auto", or one of the forms: "fused", "chunked", "torch"; "triton" is whichever of the first two suits.

    Returns:
        TokenStats of ``[T]`` tensors on the device of ``hidden``; sums are kept in float32 or better.

    Raises:
        ValueError: shapes or devices that do not fit, a label outside [0, V), a row outside [0, N), ``top_k`` below 1,
            an unknown statistic or ``impl``, or one that cannot run here.
    """
    head, wanted = Head(weight, bias, softcap, logit_scale), Wanted.of(statistics)
    check_operands(hidden, head, labels, rows)
    check_top_k(top_k)
    name = dispatch.head_form(impl, hidden, weight)
    if rows is not None and hidden.is_cuda:
        rows, labels = keep_in_range(rows, mark_ignored(labels, ignore_index), len(hidden))
        return _statistics(name, hidden, rows, head, labels, wanted, top_k)
    n_scored = count_scored(labels, len(weight), ignore_index)
    if rows is not None:
        check_rows(rows, len(hidden))
    labels = mark_ignored(labels, ignore_index)
    if n_scored == len(labels):
        return _statistics(name, hidden, rows, head, labels, wanted, top_k)
    scored = (labels >= 0).nonzero().squeeze(1)
    own_rows = scored if rows is None else rows[scored]
    return _spread(_statistics(name, hidden, own_rows, head, labels[scored], wanted, top_k), scored, len(labels))


@torch.no_grad()
def token_stats_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    top_k: int | None = None,
    statistics: Collection[str] = STATISTICS,
    ignore_index: int = IGNORE_INDEX,
    impl: str = "auto",
) -> TokenStats:
    """``token_stats`` for code that has the logits already; they are read once (about twice more for ``top_k``).

    Args:
        logits: ``[T, V]``, of any floating dtype; not changed.
        labels: as in ``token_stats``; rows whose label is ignored are read and come out as NaN. On a GPU nothing is
            read back, and a label out of range gives NaN as well.
        top_k: as in ``token_stats``.
        statistics: as in ``token_stats``.
        ignore_index: label of rows to leave out.
        impl: "auto", "triton" or "torch".

    Raises:
        ValueError: as ``token_stats``.
    """
    check_logits(logits, labels)
    check_top_k(top_k)
    if not logits.is_cuda:
        count_scored(labels, logits.shape[1], ignore_index)
    wanted, labels = Wanted.of(statistics), mark_ignored(labels, ignore_index)
    if dispatch.logits_form(impl, logits) == "torch":
        return token_stats_torch.from_logits(logits, labels, wanted, top_k)
    with torch.cuda.device_of(logits):
        return _from_logits(along_rows(logits), labels.contiguous(), wanted, top_k, None)


@torch.no_grad()
def token_stats_naive(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    top_k: int | None = None,
    statistics: Collection[str] = STATISTICS,
    ignore_index: int = IGNORE_INDEX,
) -> TokenStats:
    """The definition, word for word, with every logit in float64; arguments and result as ``token_stats``."""
    check_operands(hidden, Head(weight, bias, softcap, logit_scale), labels, rows)
    check_top_k(top_k)
    count_scored(labels, len(weight), ignore_index)
    hidden = hidden if rows is None else hidden[rows]
    z = head_logits(hidden.double(), weight.double(), bias, softcap, logit_scale)
    return token_stats_from_logits_naive(z, labels, top_k=top_k, statistics=statistics, ignore_index=ignore_index)


def token_stats_from_logits_naive(
    logits: Tensor,
    labels: Tensor,
    *,
    top_k: int | None = None,
    statistics: Collection[str] = STATISTICS,
    ignore_index: int = IGNORE_INDEX,
) -> TokenStats:
    """The definition in float64; arguments and result as ``token_stats_from_logits``."""
    wanted, z = Wanted.of(statistics), logits.double()
    label = labels.where(labels != ignore_index, 0).unsqueeze(1)
    log_p = z.log_softmax(1)
    p = log_p.exp()
    one_hot = torch.zeros_like(p).scatter_(1, label, 1.0)
    rank = 1 + (z > z.gather(1, label)).sum(1)
    brier_topk = None
    if top_k is not None:
        # The label leads its ties: a stable descending sort of the other logits behind it.
        others = z.scatter(1, label, float("-inf")).sort(1, descending=True).values[:, :-1]
        inside = rank <= top_k
        q_in = torch.cat([z.gather(1, label), others[:, : top_k - 1]], 1).softmax(1)
        q_out = others[:, :top_k].softmax(1) if others.shape[1] else q_in
        brier_topk = torch.where(inside, (1 - q_in[:, 0]) ** 2 + (q_in[:, 1:] ** 2).sum(1), 1 + (q_out**2).sum(1))
    broken = (labels == ignore_index) | ~log_p.gather(1, label).squeeze(1).isfinite()
    nan = float("nan")
    return TokenStats(
        nll=(-log_p.gather(1, label).squeeze(1)).masked_fill(broken, nan),
        brier=((one_hot - p) ** 2).sum(1).masked_fill(broken, nan) if wanted.brier else None,
        entropy=torch.special.entr(p).sum(1).masked_fill(broken, nan) if wanted.entropy else None,
        rank=rank.masked_fill(broken, 0) if wanted.rank else None,
        agreement=(rank == 1) & ~broken,
        brier_topk=None if brier_topk is None else brier_topk.masked_fill(broken, nan),
    )


class Form(NamedTuple):
    """The steps of a form of the head; on a GPU, hidden and weight ``[*, D]`` have a contiguous last axis."""

    label_logits: Callable[..., Tensor]  # (hidden, rows, head, labels) -> [T]
    partial_sums: Callable[..., Tensor]  # (hidden, rows, head, labels, label_logit, wanted) -> [splits, 5, T]
    finish: Callable[..., TokenStats]  # (partials, label_logit, wanted)


def form(name: str) -> Form:
    """By name out of ``dispatch.FORMS``."""
    if name == "torch":
        return Form(token_stats_torch.label_logits, token_stats_torch.partial_sums, softmax_sums.finish)
    from lark_fast.kernels import logits_triton, softmax_sums_triton, token_stats_triton

    sums = token_stats_triton.partial_sums if name == "fused" else logits_triton.chunked_partial_sums
    return Form(token_stats_triton.label_logits, sums, softmax_sums_triton.finish)


def _statistics(
    name: str, hidden: Tensor, rows: Tensor | None, head: Head, labels: Tensor, wanted: Wanted, top_k: int | None
) -> TokenStats:
    """The statistics by the form of that name; labels out of range give NaN."""
    if name == "torch":
        return token_stats_torch.statistics(hidden, rows, head, labels, wanted, top_k)
    hidden, rows, head, labels = for_kernels(hidden, rows, head, labels)
    with torch.cuda.device_of(hidden):
        if top_k is None:
            label_logits, partial_sums, finish = form(name)
            label_logit = label_logits(hidden, rows, head, labels)
            return finish(partial_sums(hidden, rows, head, labels, label_logit, wanted), label_logit, wanted)
        block_rows = max(128, TOPK_LOGITS_BYTES // (4 * len(head.weight)) // 128 * 128)
        parts = []
        for start in range(0, max(1, len(labels)), block_rows):
            block = slice(start, start + block_rows)
            logits = head_logits(hidden[block] if rows is None else hidden[rows[block]], head.weight)
            parts.append(_from_logits(logits, labels[block], wanted, top_k, head))
        return concatenate(parts)


def _from_logits(logits: Tensor, labels: Tensor, wanted: Wanted, top_k: int | None, head: Head | None) -> TokenStats:
    """From logits ``[T, V]`` that still lack the bias, cap and scale of ``head``, if one is given."""
    from lark_fast.kernels import logits_triton, softmax_sums_triton
    from lark_fast.kernels.topk_triton import brier_topk

    stats = softmax_sums_triton.finish(*logits_triton.partial_sums(logits, labels, wanted, head=head), wanted)
    if top_k is None:
        return stats
    rest = {} if head is None else {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
    return replace(stats, brier_topk=brier_topk(logits, labels, top_k, **rest))


def _spread(stats: TokenStats, places: Tensor, n: int) -> TokenStats:
    """Statistics of tokens that stand at ``places`` of n; the others were ignored."""

    def spread(values: Tensor) -> Tensor:
        blank = float("nan") if values.is_floating_point() else 0
        return values.new_full((n,), blank).index_copy_(0, places, values)

    return stats.map(spread)
