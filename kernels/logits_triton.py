"""Statistics of logits that exist already: a program takes some rows over one split of their columns into the sums.

It reads every logit once. The head that is cut into chunks of words (chunked) comes by here too, with the logits of one
chunk, while they are still in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lark_fast.kernels.head import Head, head_logits
from lark_fast.kernels.head_triton import finish_logits, finish_numbers
from lark_fast.kernels.softmax_sums import Wanted
from lark_fast.kernels.softmax_sums_triton import LOWEST, fold, has_gaps, leave_out, no_sums, store_sums

ROWS, COLUMNS, NUM_WARPS = 4, 1024, 4
MIN_PROGRAMS = 512  # what splits are for: fewer programs than this leave a GPU idle
MIN_SPLIT_COLUMNS = 8 * COLUMNS
CHUNK_BYTES = 32 << 20  # of float32 logits: they stay in the L2 cache of an H100 or H200 between their two kernels
MAX_CHUNK_ROWS = 8192  # more would leave chunks of too few words for the product


@triton.jit(do_not_specialize=["n_rows", "first_column", "split_columns", "stride_sums"])
def _logits_sums(
    logits, labels, label_logit, partials, bias,
    n_rows, n_columns, first_column, split_columns, stride, stride_sums, logit_scale, softcap,
    OWN_LABEL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
    BRIER: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """logits [n_rows, n_columns], whose first column is the word first_column -> partials [splits, 5, stride_sums].

    OWN_LABEL: label_logit [n_rows] is found here and written; else it is read.
    """
    split = tl.program_id(1)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = place < n_rows
    row = logits + place.to(tl.int64)[:, None] * stride
    label = tl.load(labels + place, mask=exists, other=-1).to(tl.int64) - first_column
    if OWN_LABEL:
        known = exists & (label >= 0) & (label < n_columns)
        z_label = tl.load(logits + place.to(tl.int64) * stride + label, mask=known, other=0.0).to(tl.float32)
        label_bias = tl.load(bias + label, mask=known, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
        z_label = finish_logits(z_label, label_bias, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)
        z_label = tl.where(known, z_label, float("nan"))
        if split == 0:
            tl.store(label_logit + place, z_label, mask=exists)
    else:
        z_label = tl.load(label_logit + place, mask=exists, other=0.0)
    m, base, s1, s2, sz, count = no_sums(ROWS)
    first = split * split_columns
    for start in range(first, tl.minimum(first + split_columns, n_columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        here = exists[:, None] & (column < n_columns)[None, :]
        z = tl.load(row + column[None, :], mask=here, other=LOWEST).to(tl.float32)
        own_bias = 0.0
        if HAS_BIAS:
            own_bias = tl.load(bias + column, mask=column < n_columns, other=0.0).to(tl.float32)[None, :]
        z = finish_logits(z, own_bias, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)
        gaps = has_gaps(start, n_columns, label, COLUMNS)
        z = leave_out(z, column, n_columns, label, gaps, True, True)
        m, base, s1, s2, sz, count = fold(z, z_label, m, base, s1, s2, sz, count, BRIER, ENTROPY, RANK)
    own = partials + split.to(tl.int64) * 5 * stride_sums
    store_sums(own, place, exists, stride_sums, m, base, s1, s2, sz, count, BRIER, ENTROPY, RANK)


def partial_sums(
    logits: Tensor, labels: Tensor, wanted: Wanted, *, head: Head | None = None, label_logit: Tensor | None = None,
    first_column: int = 0, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of rows of logits, and their labels' logits.

    Args:
        logits: ``[T, C]``, last axis contiguous, of any floating dtype.
        labels: ``[T]`` int64; one that is no column's is left out of nothing.
        wanted: the statistics to prepare for.
        head: bias, softcap and scale that the logits still lack (its weight is not looked at); None: they are final.
        label_logit: ``[T]`` float32 where the label's column may be elsewhere; None: it is looked up among the columns.
        first_column: the word that the first column stands for.
        out: ``[1, 5, T]``, last axis contiguous, where the sums go, of all columns as one split.

    Returns:
        Partial sums ``[splits, 5, T]`` and the labels' logits ``[T]``, NaN where a label is no column's.
    """
    n_rows, n_columns = logits.shape
    n_blocks = triton.cdiv(n_rows, ROWS)
    n_splits = 1
    if out is None:
        n_splits = max(1, min(triton.cdiv(MIN_PROGRAMS, max(1, n_blocks)), n_columns // MIN_SPLIT_COLUMNS))
        out = torch.empty(n_splits, 5, n_rows, dtype=torch.float32, device=logits.device)
    own_label = label_logit is None
    if own_label:
        label_logit = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    head = Head(logits) if head is None else head
    if n_rows:
        split_columns = triton.cdiv(triton.cdiv(n_columns, n_splits), COLUMNS) * COLUMNS
        _logits_sums[(n_blocks, n_splits)](
            logits, labels, label_logit, out, head.bias,
            n_rows, n_columns, first_column, split_columns, logits.stride(0), out.stride(1), *finish_numbers(head),
            OWN_LABEL=own_label, HAS_BIAS=head.bias is not None, HAS_SCALE=head.logit_scale is not None,
            HAS_CAP=head.softcap is not None, BRIER=wanted.brier, ENTROPY=wanted.entropy, RANK=wanted.rank,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out, label_logit


def chunked_partial_sums(
    hidden: Tensor, rows: Tensor | None, head: Head, labels: Tensor, label_logit: Tensor, wanted: Wanted
) -> Tensor:
    """``token_stats_triton.partial_sums`` by the library's own matrix product, a chunk of words at a time."""
    n_rows, n_words = len(labels), len(head.weight)
    block_rows = max(1, min(n_rows, MAX_CHUNK_ROWS))
    chunk_words = max(COLUMNS, CHUNK_BYTES // (4 * block_rows) // COLUMNS * COLUMNS)
    starts = range(0, n_words, chunk_words)
    partials = torch.empty(len(starts), 5, n_rows, dtype=torch.float32, device=hidden.device)
    for first in range(0, n_rows, block_rows):
        block = slice(first, first + block_rows)
        part = hidden[block] if rows is None else hidden[rows[block]]
        for split, start in enumerate(starts):
            words = head.columns(start, start + chunk_words)
            partial_sums(
                head_logits(part, words.weight), labels[block], wanted, head=words, label_logit=label_logit[block],
                first_column=start, out=partials[split : split + 1, :, block],
            )  # fmt: skip
    return partials
