"""Forward passes: batches of token ids go to the device one ahead, statistics of each trajectory come back."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from lark_fast.batch import Batch, Inputs, Targets
from lark_fast.errors import UserError
from lark_fast.kernels.token_stats import STATISTICS, TokenStats
from lark_fast.kernels.trajectory_reduce import TrajectoryReduction, trajectory_reduce
from lark_fast.scoring.head_sampling import sampled_means
from lark_fast.scoring.layout import Layout
from lark_fast.student import Student
from lark_fast.talk import lost_ranks

Until = Callable[[Iterable[Batch | None]], Iterator[Batch | None]]
OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")


class Scored(NamedTuple):
    """One trajectory."""

    means: dict[str, float | None]  # over its scored tokens, by the names of ``TrajectoryStats``
    n_tokens: int  # scored
    n_head: int  # of these, those that met the head: all, or a sample, see ``head_sampling``
    tokens: TokenStats | None  # their statistics, on the CPU; None where another process has scored and nobody asked
    nll_after: Tensor | None = None  # theirs under a later state of the student, as ``tokens``; see ``paired``


class Failed(NamedTuple):
    """A sequence that cannot be scored, in place of its statistics."""

    reason: str


@dataclass(slots=True)
class Work:
    """What the passes have cost so far."""

    batches: int = 0
    device_seconds: float = 0.0  # the device was at work
    padded_tokens: int = 0
    halvings: int = 0  # times that memory was short
    losses: int = 0  # processes that were lost

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class Passes:
    """Runs batches through a student, the next one on its way before the last one's numbers are back.

    Args:
        student: the student; its model is in evaluation mode.
        top_k: as in ``token_stats``.
        impl: as in ``token_stats``.
        tokens_per_batch: the most tokens of a pass; halved when the device's memory does not suffice.
        one_shape: fill packs up, so that compiled layers see one shape.
        statistics: as in ``token_stats``.

    Attributes:
        layout: how batches are put together.
        work: what has been done.
        together: of a student that is spread over ranks: each batch is run by all of them inside this.
    """

    def __init__(
        self,
        student: Student,
        *,
        top_k: int | None,
        impl: str,
        tokens_per_batch: int,
        one_shape: bool = False,
        statistics: Collection[str] = STATISTICS,
    ) -> None:
        self.student, self.top_k, self.impl, self.statistics = student, top_k, impl, statistics
        on_gpu = student.device.type == "cuda"
        self.layout = Layout(
            packed=student.unpackable is None,
            border=student.length_regime,
            tokens_per_batch=tokens_per_batch,
            pinned=on_gpu,
            one_shape=one_shape,
        )
        self.ahead = 1 if on_gpu else 0  # passes that are on their way when the next one is
        self.work = Work()
        self.together: Callable[[Batch], AbstractContextManager[None]] = self._alike

    @torch.no_grad()
    def run(self, batches: Iterable[Batch | None], until: Until = iter) -> Iterator[tuple[Batch, list[Scored] | None]]:
        """The statistics of each batch's sequences, in order of the batches.

        A batch that the device's memory cannot hold comes back in several; a single sequence that it cannot hold, with
        None in place of statistics.

        Args:
            batches: to run; None says that the next one is not at hand yet, and what is under way need not wait for it.
            until: may end them early, see ``Interrupts.until_asked``; passes under way come to their end.
        """
        layout, under_way = self.layout, deque[_Pending]()
        for batch in until(batches):
            if batch is None:
                yield from self._finished(under_way, 0)
                continue
            pieces = deque([batch])
            while pieces:
                piece = pieces.popleft()
                divisible = piece.size > max([1, *piece.lengths])
                if piece.size > layout.tokens_per_batch and divisible:
                    pieces.extendleft(reversed(layout.split(piece)))
                    continue
                pending = self._start(piece)
                if pending is not None:
                    under_way.append(pending)
                elif divisible:
                    layout.tokens_per_batch = max(1, piece.size // 2)
                    self.work.halvings += 1
                    pieces.appendleft(piece)
                yield from self._finished(under_way, 0 if pending is None else self.ahead)
                if pending is None and not divisible:
                    yield piece, None
        yield from self._finished(under_way, 0)

    def _finished(self, under_way: deque["_Pending"], left: int) -> Iterator[tuple[Batch, list[Scored]]]:
        while len(under_way) > left:
            pending = under_way.popleft()
            scored = pending.result()
            self.work.device_seconds += pending.seconds()
            self.work.padded_tokens += pending.batch.n_padded
            self.work.batches += 1
            yield pending.batch, scored

    def _start(self, batch: Batch) -> "_Pending | None":
        """Send a batch on its way; None where the device's memory does not suffice, even once it has been tidied."""
        if self.student.ranks is not None:
            return self._start_together(batch)
        for _ in range(2):
            try:
                return self._launch(batch)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
            # Outside the handler: the traceback holds what the pass had made.
            if self.student.device.type == "cuda":
                torch.cuda.empty_cache()
        return None

    def _start_together(self, batch: Batch) -> "_Pending":
        """On all ranks. One that fails leaves the others waiting for it inside the pass, so that none can do it again.

        Raises:
            UserError: this rank's memory does not suffice, or another rank is lost.
        """
        try:
            with self.together(batch), lost_ranks():
                return self._launch(batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise UserError(
                f"the memory of {self.student.device} does not suffice for a pass of {batch.size} tokens; "
                f"--tokens-per-batch {max(1, batch.size // 2)} needs less"
            ) from error

    @contextmanager
    def _alike(self, batch: Batch) -> Iterator[None]:
        """Other ranks have the same batch: they would wait for each other for ever, or mix what they make."""
        if not self.student.ranks.talk.agree(batch.numbers):
            raise ValueError("the ranks of a student are given different sequences")
        yield

    def _launch(self, batch: Batch) -> "_Pending":
        clock = _Clock(self.student.head_device)
        inputs = batch.on(self.student.device, self.student.head_device)
        pending = _Pending(batch, self._numbers(batch, inputs), inputs.ends, clock)
        if inputs.past is not None:  # not before all has had the memory it needs: the pass may have to be done again
            inputs.past.commit()
        return pending

    def _numbers(self, batch: Batch, inputs: Inputs) -> "Numbers":
        """Everything that a pass comes to, on the student's device."""
        stats = self._stats(self.student, inputs, self.top_k)
        return Numbers(stats, columns_of(trajectory_reduce(stats, inputs.ends)))

    def _stats(self, student: Student, inputs: Inputs, top_k: int | None) -> TokenStats:
        hidden = inputs.hidden
        if hidden is None:
            made = student.hidden(inputs.ids, inputs.pack, inputs.places, inputs.past)
            if inputs.past is not None:
                inputs.past.keep(made)
            hidden = made.flatten(0, 1)
        return student.token_stats(
            hidden,
            inputs.targets,
            rows=inputs.rows,
            top_k=top_k,
            statistics=self.statistics,
            impl=self.impl,
        )


class Numbers(NamedTuple):
    """What a pass comes to: statistics of its scored tokens, a column a mean of trajectories, see ``Scored``."""

    stats: TokenStats
    columns: dict[str, Tensor | None]
    nll_after: Tensor | None = None


def columns_of(reduction: TrajectoryReduction) -> dict[str, Tensor | None]:
    """What ``Scored.means`` has, ``[N]`` each."""
    means = reduction.means
    return {
        "nll": means.nll,
        "brier": means.brier,
        "brier_topk": means.brier_topk,
        "entropy": means.entropy,
        "rank_mean": means.rank,
        "rsr": reduction.rsr,
    }


class _Clock:
    """The time the device spends on a pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record(torch.cuda.current_stream(device))
        self._times = [time.perf_counter()] * 2

    def stop(self) -> None:
        """No more work follows."""
        if self.device.type == "cuda":
            self._events[1].record(torch.cuda.current_stream(self.device))
        self._times[1] = time.perf_counter()

    def wait(self) -> None:
        """Until the device has come to ``stop``."""
        if self.device.type == "cuda":
            self._events[1].synchronize()

    def seconds(self) -> float:
        """Between start and stop."""
        if self.device.type == "cuda":
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._times[1] - self._times[0]


class _Pending:
    """A pass whose numbers are on their way to the host."""

    def __init__(self, batch: Batch, numbers: Numbers, ends: Tensor, clock: _Clock) -> None:
        self.batch, self._clock = batch, clock
        # From a GPU into pinned memory, without a wait.
        self._columns = {name: _to_host(column) for name, column in numbers.columns.items()}
        self._stats, self._ends = numbers.stats.map(_to_host), _to_host(ends)
        self._nll_after = _to_host(numbers.nll_after)
        clock.stop()

    def result(self) -> list[Scored]:
        """One a sequence, in order; waits for the device."""
        self._clock.wait()
        numbers = {name: None if column is None else column.tolist() for name, column in self._columns.items()}
        scored = []
        for row, (start, end) in enumerate(itertools.pairwise(self._ends.tolist())):
            means = {name: None if column is None else column[row] for name, column in numbers.items()}
            tokens = self._stats.map(lambda values, a=start, b=end: values[a:b])
            asked, n_tokens = self.batch.sequences[row][1], end - start
            if isinstance(asked, Targets) and asked.drawn_from is not None:
                n_tokens = asked.drawn_from
                means |= sampled_means(tokens, n_tokens)
            after = None if self._nll_after is None else self._nll_after[start:end]
            scored.append(Scored(means, n_tokens, end - start, tokens, after))
        return scored

    def seconds(self) -> float:
        """The device's time, once ``result`` has been there."""
        return self._clock.seconds()


def _to_host(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to("cpu", non_blocking=True)


def _is_out_of_memory(error: Exception) -> bool:
    # The allocators of a CPU, of pinned memory, of cuBLAS and of Triton have no exception of their own.
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in OUT_OF_MEMORY)
