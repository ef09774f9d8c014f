"""Answers are judged in processes of their own, which are killed where one takes too long."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lark_fast.errors import UserError
from lark_fast.evaluation.answers import find_answer
from lark_fast.evaluation.checker import CHOICE, MATH, Text, Verdict, check

if TYPE_CHECKING:
    from concurrent.futures import Future

_NEEDED = ("math_verify", "pebble", "scipy")
TOO_SLOW, BROKEN = "judging it takes too long", "judging it fails"
_MEMORY = 4 << 30  # bytes of a process's address space
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_WAITING = 64  # problems handed over before the first of them is done


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A problem's answers, to be judged.

    Attributes:
        kind: "math" or "choice".
        gold: the right answer; of a choice, its letter.
        choices: the options' texts; () where they are not known.
    """

    kind: str
    gold: str
    texts: tuple[Text, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a problem's answers are worth.

    Attributes:
        verdicts: one a text.
        votes: texts with equal answers have the same number; None: no answer.
        majority: the verdict on the answer that most texts give, of several the one that came first.
    """

    verdicts: tuple[Verdict, ...]
    votes: tuple[int | None, ...]
    majority: Verdict


class Judge:
    """Judges answers, inside a ``with`` block.

    Args:
        seconds: that one text may take; a text that takes longer is wrong, and no other suffers.
        workers: processes; None: one a core, four at most.

    Raises:
        UserError: see ``refuse_without_judge``.
    """

    def __init__(self, *, seconds: float = 10.0, workers: int | None = None) -> None:
        self._seconds, self._workers = seconds, workers or min(4, os.cpu_count() or 1)

    def __enter__(self) -> "Judge":
        import multiprocessing

        refuse_without_judge()
        from pebble import ProcessPool

        # A fork would take over the threads' locks of torch.
        self._pool = ProcessPool(
            max_workers=self._workers, initializer=_prepare, context=multiprocessing.get_context("spawn")
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def judge(self, tasks: Iterable[Task]) -> Iterator[Judged]:
        """The tasks' judgements, in their order.

        Raises:
            ValueError: a task without a right answer.
        """
        waiting: deque[tuple[Task, Future]] = deque()
        for task in tasks:
            if not task.gold.strip():
                raise ValueError("a problem without a right answer cannot be judged")
            waiting.append((task, self._hand_over(task, task.texts)))
            if len(waiting) >= _WAITING:
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())

    def _hand_over(self, task: Task, texts: Sequence[Text], *, share: int = 1) -> "Future":
        seconds = self._seconds * share
        return self._pool.schedule(check, args=(task.kind, task.gold, task.choices, texts), timeout=seconds)

    def _result(self, task: Task, future: "Future") -> Judged:
        try:
            verdicts, votes = future.result()
        except Exception:  # of the time limit, of a process that died, of anything that a checker may come upon
            verdicts, votes = self._one_by_one(task)
        counts = {vote: votes.count(vote) for vote in votes if vote is not None}
        most = max(counts, key=counts.__getitem__, default=None)  # of several the first
        majority = Verdict(correct=False) if most is None else verdicts[votes.index(most)]
        return Judged(verdicts=tuple(verdicts), votes=tuple(votes), majority=majority)

    def _one_by_one(self, task: Task) -> tuple[list[Verdict], list[int | None]]:
        """Find the texts that cannot be judged, and judge the others."""
        verdicts: list[Verdict] = []
        good: list[int] = []
        for place, text in enumerate(task.texts):
            try:
                (verdict,), _ = self._hand_over(task, [text]).result()
                good.append(place)
            except Exception as error:  # as above
                fault = TOO_SLOW if isinstance(error, TimeoutError) else BROKEN
                answer = find_answer(text.text, thinking=text.thinking, lettered=task.kind == CHOICE).answer
                verdict = Verdict(correct=False, answer=answer, fault=fault)
            verdicts.append(verdict)
        try:
            _, numbers = self._hand_over(task, [task.texts[place] for place in good], share=len(good) or 1).result()
        except Exception:  # two that can be read may still not be comparable
            numbers = _votes_by_words([verdicts[place] for place in good])
        votes: list[int | None] = [None] * len(verdicts)
        for place, number in zip(good, numbers, strict=True):
            votes[place] = number
        return verdicts, votes


def refuse_without_judge() -> None:
    """Before a model writes for hours what nobody could judge.

    Raises:
        UserError: a package that judging or measuring needs is not installed.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"judging answers needs {', '.join(missing)}: pip install 'lark-fast[eval]'")


def _votes_by_words(verdicts: Sequence[Verdict]) -> list[int | None]:
    """Votes where values cannot be compared: right answers are equal, wrong ones where they read the same."""
    said = [None if verdict.fault else (verdict.correct or verdict.answer) for verdict in verdicts]
    numbers = {answer: number for number, answer in enumerate(dict.fromkeys(filter(None, said)))}
    return [numbers.get(answer) for answer in said]


def _prepare() -> None:
    """Make a process ready: its memory bounded, Ctrl-C left to its parent, all that is slow once done."""
    import ctypes
    import logging
    import resource
    import signal
    import sys

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # one that is in an endless expression does not see that its parent was killed
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time limit that it does not have
    # Imports and the parser's tables take a second, which is not the first text's to pay for.
    check(MATH, "5", (), [Text(text="\\boxed{5}")])
