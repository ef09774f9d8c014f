"""How trajectories are brought together: windows of the stream, and inside a window packs or padded batches."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

WINDOW_RECORDS = 4096
WINDOW_TOKENS = 1 << 20
# A window is read, planned and written as a whole: what a run waits for at its start, so about half a minute of passes.
CPU_WINDOW_FLOP, GPU_WINDOW_FLOP = 4e12, 4e15


T = TypeVar("T")


def windows(
    items: Iterable[tuple[T, int]], max_items: int = WINDOW_RECORDS, max_tokens: int = WINDOW_TOKENS
) -> Iterator[list[T]]:
    """Cut a stream of (item, its tokens) into lists, each closed by the item that fills it.

    Where the cuts fall depends on nothing but the items, so a run that is stopped and started again after any number of
    whole windows cuts the rest at the same places.
    """
    window: list[T] = []
    tokens = 0
    for item, size in items:
        window.append(item)
        tokens += size
        if len(window) >= max_items or tokens >= max_tokens:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def window_tokens(n_parameters: int, tokens_per_batch: int, device: str) -> int:
    """How many tokens a window should hold, by the 2 FLOP a parameter that a token's forward pass takes.

    Never more than WINDOW_TOKENS and never fewer than four batches, or there would be nothing to sort. So a resumed run
    with the same batching cuts the same windows.
    """
    flop = CPU_WINDOW_FLOP if device == "cpu" else GPU_WINDOW_FLOP
    return max(4 * tokens_per_batch, min(WINDOW_TOKENS, int(flop / (2 * n_parameters))))


def length_batches(lengths: Sequence[int], tokens_per_batch: int, border: int | None = None) -> Iterator[list[int]]:
    """Indices of sequences grouped so that rows x longest row stays within ``tokens_per_batch``, longest first.

    A sequence longer than the budget is a batch of its own. Neighbours in length share a batch: little padding. Those
    longer than ``border`` share none with those that are not, see ``packs``.
    """
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        crossed = border is not None and lengths[index] <= border < longest
        if batch and (crossed or (len(batch) + 1) * longest > tokens_per_batch):
            yield batch
            batch = []
        if not batch:
            longest = max(1, lengths[index])  # a row of nothing is a column wide
        batch.append(index)
    if batch:
        yield batch


def packs(lengths: Sequence[int], tokens_per_pack: int, border: int | None = None) -> Iterator[list[int]]:
    """Indices of sequences grouped so that each group's tokens fit into ``tokens_per_pack``, longest first.

    Best fit: a sequence goes where the least room is left by it, so nearly all packs are nearly full. A sequence longer
    than the budget is a pack of its own.

    Args:
        lengths: tokens of each sequence.
        tokens_per_pack: the budget.
        border: sequences longer than this never share a pack with those that are not (LongRoPE scales a whole pack's
            positions).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if border is not None:
        for group in ([i for i in order if lengths[i] > border], [i for i in order if lengths[i] <= border]):
            yield from _best_fit(group, lengths, tokens_per_pack)
    else:
        yield from _best_fit(order, lengths, tokens_per_pack)


def _best_fit(order: Sequence[int], lengths: Sequence[int], tokens_per_pack: int) -> list[list[int]]:
    made: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for index in order:
        at = bisect_left(room, (lengths[index], 0))
        if at < len(room):
            left, number = room.pop(at)
            made[number].append(index)
        else:
            left, number = tokens_per_pack, len(made)
            made.append([index])
        if left > lengths[index]:
            insort(room, (left - lengths[index], number))
    return made
