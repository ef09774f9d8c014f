"""What goes into the scoring head, checked and laid out as its forms take it."""

from dataclasses import replace

import torch
from torch import Tensor

from lark_fast.kernels.head import Head

IGNORE_INDEX = -100  # the label of rows to leave out, as Transformers has it


def check_operands(hidden: Tensor, head: Head, labels: Tensor, rows: Tensor | None) -> None:
    """Raises ValueError where shapes, dtypes or devices do not fit."""
    weight, bias = head.weight, head.bias
    for name, value in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a tensor, not a {type(value).__name__}")
    if hidden.ndim != 2 or weight.ndim != 2 or labels.ndim != 1:
        n = "T" if rows is None else "N"
        raise ValueError(
            f"hidden [{n}, D], weight [V, D] and labels [T] are expected, not {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"D differs: hidden has {hidden.shape[1]}, weight has {weight.shape[1]}")
    if 0 in weight.shape:
        raise ValueError(f"V and D are at least 1: weight [V, D] is {tuple(weight.shape)}")
    if rows is None and hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"T differs: hidden has {hidden.shape[0]}, labels has {labels.shape[0]}")
    if rows is not None and rows.shape != labels.shape:
        raise ValueError(f"rows is [T] = [{labels.shape[0]}], not {tuple(rows.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is [V] = [{weight.shape[0]}], not {tuple(bias.shape)}")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap={head.softcap}: above 0, or None")
    others = (weight, labels, rows, bias)
    if any(tensor is not None and tensor.device != hidden.device for tensor in others):
        raise ValueError(f"hidden is on {hidden.device}, and weight, labels, rows or bias is not")
    _check_whole("labels", labels)
    if rows is not None:
        _check_whole("rows", rows)


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Raises ValueError where shapes or dtypes do not fit."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits [T, V] and labels [T] are expected, not {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if logits.shape[1] == 0:
        raise ValueError("V is at least 1: logits [T, V] have no column")
    _check_whole("labels", labels)


def check_top_k(top_k: int | None) -> None:
    """Raises ValueError where ``top_k`` is below 1."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: at least 1")


def count_scored(labels: Tensor, n_words: int, ignore_index: int) -> int:
    """How many labels ``[T]`` are not ignored; on a GPU, one wait.

    Raises:
        ValueError: one of them is outside [0, n_words).
    """
    ignored = labels == ignore_index
    outside = ((labels < 0) | (labels >= n_words)) & ~ignored
    n_ignored, n_outside = torch.stack((ignored.sum(), outside.sum())).tolist()
    if n_outside:
        raise ValueError(f"label {labels[outside][0].item()} is outside [0, {n_words})")
    return len(labels) - n_ignored


def check_rows(rows: Tensor, n: int) -> None:
    """Raises ValueError where a row is outside [0, n); on a GPU, one wait."""
    outside = (rows < 0) | (rows >= n)
    if outside.any():
        raise ValueError(f"row {rows[outside][0].item()} is outside [0, {n})")


def mark_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels ``[T]`` as int64, -1 where they are ignored: no word, whatever the mark was."""
    return labels.long().masked_fill(labels == ignore_index, -1)


def keep_in_range(rows: Tensor, labels: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Rows ``[T]`` that nobody has looked at: those outside [0, n) become row 0, their labels -1."""
    inside = (rows >= 0) & (rows < n)
    return rows.long().where(inside, 0), labels.where(inside, -1)


def for_kernels(
    hidden: Tensor, rows: Tensor | None, head: Head, labels: Tensor
) -> tuple[Tensor, Tensor | None, Head, Tensor]:
    """The operands with the strides that kernels take; only what has others is copied."""
    bias = None if head.bias is None else head.bias.contiguous()
    head = replace(head, weight=along_rows(head.weight), bias=bias)
    return along_rows(hidden), None if rows is None else rows.contiguous(), head, labels.contiguous()


def along_rows(matrix: Tensor) -> Tensor:
    """With a contiguous last axis, which is what kernels read along."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _check_whole(name: str, values: Tensor) -> None:
    if values.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} are int64 or int32, not {values.dtype}")
