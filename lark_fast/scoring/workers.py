"""Chunks of work go to processes of their own and come back in order."""

import pickle
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lark_fast.errors import UserError
from lark_fast.processes import ChildProcess, Line, LostProcessError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

_CHUNKS_A_WORKER = 4  # one in work, the others on their way there or back
_BYTES_A_WORKER = 4 << 20
# Tokenizers' own threads would only be in each other's way: there is a process for every core already.
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """What a worker sends in place of a result."""

    reason: str
    trace: str
    at_start: bool = False
    out_of_memory: bool = False


def map_in_workers(
    function: Callable[[Chunk], Result],
    chunks: Iterator[tuple[Chunk, int]],
    workers: int,
    *,
    descriptors: Sequence[int] = (),
) -> Iterator[Result]:
    """Yield ``function(chunk)`` for every chunk, in order, from worker processes.

    A bounded number of chunks and bytes is under way at a time. An error of ``chunks`` itself is raised behind the
    results of what it gave before. The workers are gone when the iterator ends, is closed, or raises.

    Args:
        function: sent to each worker once, pickled.
        chunks: what to send, and how many bytes it is, about.
        workers: how many processes, at least 1.
        descriptors: file descriptors that the workers inherit under the same numbers.

    Raises:
        UserError: a worker was killed or is out of memory, or ``function`` cannot be sent.
        RuntimeError: ``function`` raised; its traceback is in the message.
    """
    try:
        pickled = pickle.dumps(function)
    # Whatever a tokenizer's own code raises when it is pickled.
    except Exception as error:
        raise _cannot_be_sent(error) from error
    team: list[ChildProcess] = []
    try:
        for _ in range(workers):
            team.append(_start(descriptors))
        for worker in team:
            worker.send(pickled)
        yield from _in_turn(team, chunks)
    finally:
        for worker in team:
            worker.kill()
        for worker in team:
            worker.wait()


def _start(descriptors: Sequence[int]) -> ChildProcess:
    try:
        return ChildProcess(work, _ENVIRONMENT, descriptors=descriptors)
    except OSError as error:
        raise UserError(f"no worker process can be started ({error}); use fewer --workers") from error


def _in_turn(team: list[ChildProcess], chunks: Iterator[tuple[Any, int]]) -> Iterator[Any]:
    """Deal the chunks out in turn and collect the results in the same order."""
    under_way: deque[tuple[ChildProcess, int]] = deque()
    bytes_under_way, sent, stopped = 0, 0, None
    while True:
        try:
            chunk, size = next(chunks)
        except StopIteration:
            break
        except Exception as error:
            stopped = error
            break
        while under_way and (
            len(under_way) >= _CHUNKS_A_WORKER * len(team) or bytes_under_way + size > _BYTES_A_WORKER * len(team)
        ):
            worker, done = under_way.popleft()
            bytes_under_way -= done
            yield _result(worker)
        worker = team[sent % len(team)]
        worker.send(pickle.dumps(chunk))
        under_way.append((worker, size))
        bytes_under_way, sent = bytes_under_way + size, sent + 1
    while under_way:
        yield _result(under_way.popleft()[0])
    if stopped is not None:
        raise stopped


def _result(worker: ChildProcess) -> Any:
    """Wait for the next result of a worker."""
    try:
        result = worker.receive()
    except LostProcessError as lost:
        memory = ", perhaps for want of memory" if lost.killed else ""
        raise UserError(f"a worker process {lost.how}{memory}; use fewer --workers, or --workers 0 for none") from None
    if not isinstance(result, _Failure):
        return result
    if result.out_of_memory:
        raise UserError("a worker process ran out of memory; use fewer --workers")
    if result.at_start:
        raise _cannot_be_sent(result.reason)
    raise RuntimeError(f"in a worker process:\n{result.trace}")


def _cannot_be_sent(reason: Any) -> UserError:
    return UserError(f"the tokenizer cannot be sent to worker processes ({reason}); use --workers 0")


def work(descriptor: int) -> None:
    """Be a worker: take the function, then chunks, and send results, until the parent is gone."""
    line, function = Line(descriptor), None
    while True:
        received = line.received.get()
        try:
            if function is None:
                function = pickle.loads(received)
                continue
            result = pickle.dumps(function(pickle.loads(received)))
        # An interpreter's panic is no Exception; whatever it is, the parent is to say it.
        except BaseException as error:
            result = pickle.dumps(
                _Failure(
                    reason=f"{type(error).__name__}: {error}",
                    trace=traceback.format_exc(),
                    at_start=function is None,
                    out_of_memory=isinstance(error, MemoryError),
                )
            )
        line.tell(result)
