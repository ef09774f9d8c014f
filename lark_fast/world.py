"""The ranks of a run: those that torchrun has started, or this process alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lark_fast.student import choose_device

TIMEOUT = timedelta(minutes=30)  # rank 0 may be writing a checkpoint while the others wait


@dataclass(frozen=True, slots=True)
class World:
    """How many ranks there are and which of them this is. What one rank alone does, ``main`` does."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The values of all ranks added up, on every rank the same."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any rank says so; on every rank the same."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=device)).item())

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


@contextmanager
def started_by_torchrun(device: str) -> Iterator[tuple[World, str]]:
    """The world, and this rank's device, for the duration of the block.

    Args:
        device: what the user asked for: under torchrun "auto" and "cuda" become this rank's own GPU.

    Raises:
        UserError: this rank has no GPU of its own.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE, device
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    place = choose_device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    yield World(dist.get_rank(), dist.get_world_size()), str(place)
    dist.destroy_process_group()  # not where one rank has failed: the others would not answer
