"""The fused head: hidden states in, statistics of every token out, and the logits never leave the chip.

A program holds a block of rows and walks one split of the vocabulary in tiles. The tensor cores make a tile's logits in
float32; at once they are folded into the rows' running sums, the label's own column left out (softmax_sums.py). A
second kernel combines the splits.

The label's logit is the diagonal of hidden x weight[labels]^T, made by the same instructions in the same order as the
tiles', so that a word with the label's weights ties with it.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lark_fast.kernels.dispatch import HALF, HeadConfig, head_config
from lark_fast.kernels.head import Head
from lark_fast.kernels.head_triton import finish_logits, finish_numbers, product
from lark_fast.kernels.softmax_sums import Wanted
from lark_fast.kernels.softmax_sums_triton import fold, has_gaps, leave_out, no_sums, store_sums

LABEL_ROWS, FLOAT_LABEL_ROWS = 64, 32
MAX_SPLITS = 64
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit(do_not_specialize=["n_rows", "n_words"])
def _label_logits(
    hidden, weight, bias, rows, labels, out,
    n_rows, n_words, stride_hidden, stride_weight, logit_scale, softcap,
    D: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr, RAISE: tl.constexpr,
):  # fmt: skip
    """Each row's logit for its own label [n_rows], NaN where the label is no word."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, label = _rows_and_labels(rows, labels, place, n_rows, HAS_ROWS)
    known = (label >= 0) & (label < n_words)
    word = tl.where(known, label, 0)
    square = product(
        hidden, weight, row, word, D, stride_hidden, stride_weight, ROWS, ROWS, INNER, False, False, PRECISION, RAISE
    )  # fmt: skip
    index = tl.arange(0, ROWS)
    x = tl.sum(tl.where(index[:, None] == index[None, :], square, 0.0), 1)
    own_bias = tl.load(bias + word).to(tl.float32) if HAS_BIAS else x
    x = finish_logits(x, own_bias, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)
    tl.store(out + place, tl.where(known, x, float("nan")), mask=place < n_rows)


@triton.jit
def _rows_and_labels(rows, labels, place, n_rows, HAS_ROWS: tl.constexpr):
    """Row of hidden and label of places [R], int64; those of the last place behind the end."""
    inside = tl.minimum(place, n_rows - 1)
    row = (tl.load(rows + inside) if HAS_ROWS else inside).to(tl.int64)
    return row, tl.load(labels + inside).to(tl.int64)


@triton.jit(do_not_specialize=["n_rows", "n_words", "n_splits", "split_tiles", "group"])
def _partial_sums(
    hidden, weight, bias, rows, labels, label_logit, partials,
    n_rows, n_words, n_splits, split_tiles, group, stride_hidden, stride_weight, logit_scale, softcap,
    D: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
    BRIER: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, INNER: tl.constexpr, SLICES: tl.constexpr, FLATTEN: tl.constexpr,
    ROW_BOXES: tl.constexpr, WORD_BOXES: tl.constexpr, PRECISION: tl.constexpr, RAISE: tl.constexpr,
):  # fmt: skip
    """Sums of a block of rows over one split of the vocabulary -> partials [n_splits, 5, n_rows]."""
    # Programs that run together hold the blocks of one group and the same few splits: hidden states and words that
    # they read then stay in the L2 cache.
    first = tl.program_id(0) // (group * n_splits) * group
    members = tl.minimum(tl.cdiv(n_rows, ROWS) - first, group)
    within = tl.program_id(0) % (group * n_splits)
    split = within // members
    first_row = (first + within % members) * ROWS
    place = first_row + tl.arange(0, ROWS)
    row, label = _rows_and_labels(rows, labels, place, n_rows, HAS_ROWS)
    if ROW_BOXES:
        row = first_row
    label = label.to(tl.int32)
    z_label = tl.load(label_logit + tl.minimum(place, n_rows - 1))
    m, base, s1, s2, sz, count = no_sums(ROWS)
    first_tile = split * split_tiles
    tiles = tl.minimum(tl.cdiv(n_words, WORDS) - first_tile, split_tiles)
    for i in tl.range(0, tiles, flatten=FLATTEN):
        tile = (first_tile + i) * WORDS
        word = tile if WORD_BOXES else tl.minimum(tile + tl.arange(0, WORDS), n_words - 1).to(tl.int64)
        x = product(
            hidden, weight, row, word, D, stride_hidden, stride_weight,
            ROWS, WORDS, INNER, ROW_BOXES, WORD_BOXES, PRECISION, RAISE,
        )  # fmt: skip
        gaps = has_gaps(tile, n_words, label, WORDS)
        # One slice of the tile after the other: its temporaries then fit in the registers that the product leaves.
        if SLICES == 2:
            left, right = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, WORDS // 2]), [0, 2, 1]))
        for s in tl.static_range(SLICES):
            part = x if SLICES == 1 else (left if s == 0 else right)
            column = tile + s * (WORDS // SLICES) + tl.arange(0, WORDS // SLICES)
            own_bias = tl.load(bias + tl.minimum(column, n_words - 1)).to(tl.float32)[None, :] if HAS_BIAS else 0.0
            z = finish_logits(part, own_bias, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)
            z = leave_out(z, column, n_words, label, gaps, HAS_BIAS, not FLATTEN)
            m, base, s1, s2, sz, count = fold(z, z_label, m, base, s1, s2, sz, count, BRIER, ENTROPY, RANK)
    own = partials + split.to(tl.int64) * 5 * n_rows
    store_sums(own, place, place < n_rows, n_rows, m, base, s1, s2, sz, count, BRIER, ENTROPY, RANK)


def label_logits(
    hidden: Tensor, rows: Tensor | None, head: Head, labels: Tensor, config: HeadConfig | None = None
) -> Tensor:
    """``[T]`` float32 logits of the labels, NaN where a label is no word; arguments as in ``partial_sums``."""
    out = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
    if len(labels):
        config = config or head_config(hidden, head)
        label_rows = LABEL_ROWS if hidden.dtype in HALF else FLOAT_LABEL_ROWS
        _label_logits[(triton.cdiv(len(labels), label_rows),)](
            hidden, head.weight, head.bias, rows, labels, out, len(labels), *head_sizes(hidden, head),
            **head_flags(hidden, rows, head), ROWS=label_rows, INNER=config.inner, num_warps=4,
        )  # fmt: skip
    return out


def partial_sums(
    hidden: Tensor, rows: Tensor | None, head: Head, labels: Tensor, label_logit: Tensor, wanted: Wanted,
    config: HeadConfig | None = None,
) -> Tensor:  # fmt: skip
    """Sums over the words that are not the label -> ``[splits, 5, T]`` float32.

    Args:
        hidden: ``[N, D]``, last axis contiguous.
        rows: ``[T]`` int64 in [0, N), which rows of ``hidden``; None: all of them.
        head: weight ``[V, D]``, last axis contiguous, in the dtype of ``hidden``.
        labels: ``[T]`` int64.
        label_logit: ``[T]`` float32, what ranks are counted against.
        wanted: the statistics to prepare for; the sums of others are left uninitialised.
        config: how to cut the work; None takes the table's.
    """
    config = config or head_config(hidden, head)
    n_rows, (n_words, _) = len(labels), head.weight.shape
    n_blocks, n_tiles = triton.cdiv(n_rows, config.rows), triton.cdiv(n_words, config.words)
    split_tiles = triton.cdiv(n_tiles, _splits(n_blocks, n_tiles, _processors(hidden.device)))
    n_splits = triton.cdiv(n_tiles, split_tiles)
    partials = torch.empty(n_splits, 5, n_rows, dtype=torch.float32, device=hidden.device)
    if n_rows:
        n_words, *rest = head_sizes(hidden, head)
        row_boxes = config.boxes and rows is None
        of_hidden = TensorDescriptor.from_tensor(hidden, [config.rows, config.inner]) if row_boxes else hidden
        weight = head.weight
        of_weight = TensorDescriptor.from_tensor(weight, [config.words, config.inner]) if config.boxes else weight
        _partial_sums[(n_blocks * n_splits,)](
            of_hidden, of_weight, head.bias, rows, labels, label_logit, partials,
            n_rows, n_words, n_splits, split_tiles, _group(hidden, config, n_blocks), *rest,
            **head_flags(hidden, rows, head), BRIER=wanted.brier, ENTROPY=wanted.entropy, RANK=wanted.rank,
            ROWS=config.rows, WORDS=config.words, INNER=config.inner, SLICES=config.slices, FLATTEN=config.flatten,
            ROW_BOXES=row_boxes, WORD_BOXES=config.boxes,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return partials


def head_sizes(hidden: Tensor, head: Head) -> tuple[int | float, ...]:
    """What kernels on ``product`` take for n_words, the strides of hidden and weight, logit_scale and softcap."""
    strides = hidden.stride(0), head.weight.stride(0)
    return len(head.weight), *strides, *finish_numbers(head)


def head_flags(hidden: Tensor, rows: Tensor | None, head: Head) -> dict[str, bool | int | str]:
    """Their compile-time arguments that do not depend on the tiles."""
    return {
        "D": hidden.shape[1],
        "HAS_ROWS": rows is not None,
        "HAS_BIAS": head.bias is not None,
        "HAS_SCALE": head.logit_scale is not None,
        "HAS_CAP": head.softcap is not None,
        "PRECISION": "ieee",
        "RAISE": INTERPRETED and hidden.dtype == torch.bfloat16,
    }


def _splits(n_blocks: int, n_tiles: int, processors: int) -> int:
    """Into how many splits the vocabulary is cut: the fewest that keep every processor busy to the end."""

    def tiles_in_turn(splits: int) -> int:
        return triton.cdiv(n_blocks * splits, processors) * triton.cdiv(n_tiles, splits)

    return min(range(1, min(MAX_SPLITS, n_tiles) + 1), key=lambda splits: (tiles_in_turn(splits), splits))


def _group(hidden: Tensor, config: HeadConfig, n_blocks: int) -> int:
    """How many blocks of rows take a third of the L2 cache."""
    block_bytes = config.rows * hidden.shape[1] * hidden.element_size()
    return max(1, min(n_blocks, _l2_bytes(hidden.device) // 3 // block_bytes))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 14
