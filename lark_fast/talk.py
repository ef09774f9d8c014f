"""What the ranks of a process group tell each other on the host, whatever their devices are at."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lark_fast.errors import UserError

T = TypeVar("T")
NO_END = timedelta(days=365)  # one rank may read a pool for hours before there is a pass for all


class LostRankError(UserError):
    """Another rank has ended in the middle of the work; why, it says itself."""

    def __init__(self) -> None:
        super().__init__("another rank has ended, and the others cannot go on without it; what it has said is why")


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Inside the block, what a collective call raises where another rank has ended becomes a ``LostRankError``."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostRankError from error
        raise


class Talk:
    """All ranks of the default process group make the same calls; what a call returns is the same on all of them."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=NO_END)

    def told(self, what: Any = None) -> Any:
        """What rank 0 tells the others; waits for it."""
        word = [what]
        with lost_ranks():
            dist.broadcast_object_list(word, group=self._group)
        return word[0]

    def least(self, numbers: Tensor) -> Tensor:
        """The smallest of all ranks' numbers ``[N]``, each by itself."""
        smallest = numbers.clone()
        with lost_ranks():
            dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self._group)
        return smallest

    def first(self, fault: str | None) -> str | None:
        """The fault of the first rank that has one."""
        faults: list[str | None] = [None] * self.size
        with lost_ranks():
            dist.all_gather_object(faults, fault, group=self._group)
        return next((found for found in faults if found is not None), None)

    def done(self, work: Callable[[], T]) -> T:
        """What it returns, once all ranks have done it.

        Raises:
            ValueError: it has failed on another rank. Where it has failed on this one, what it has raised.
        """
        result, own = None, None
        try:
            result = work()
        except Exception as error:
            own = error
        fault = self.first(None if own is None else f"rank {self.rank}: {' '.join(str(own).split())}")
        if own is not None:
            raise own
        if fault is not None:
            raise ValueError(fault)
        return result

    def agree(self, numbers: Tensor) -> bool:
        """Whether all ranks have the same int64 numbers ``[N]``, which lie on the host."""
        digest = hashlib.blake2b(numbers.numpy(), digest_size=8).digest()
        own = torch.tensor(int.from_bytes(digest) >> 1)
        smallest, largest = self.least(torch.stack([own, -own])).tolist()
        return smallest == -largest
