"""What a benchmark's verdicts come to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lark_fast.intervals import Interval, mean_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """Shares of a benchmark's P problems, n answers each, with their intervals over problems.

    Attributes:
        acc_1: how often one answer is right.
        acc_n: problems of whose n answers one or more is right (n = 5: the paper's ACC@5).
        majority: problems whose most frequent answer is right.
        acc_k: by k from 1 to n, problems of which k answers hold a right one.
        groups: the same by level or domain, where a benchmark has them.
        unanswered, cut: shares of answers in which none was found, or that were ended from outside.
        tokens: of an answer, on average; 0 where they were made elsewhere.
    """

    problems: int
    n: int
    acc_1: Interval
    acc_n: Interval
    majority: Interval
    acc_k: tuple[float, ...]
    unanswered: float
    cut: float
    tokens: float
    groups: dict[str, "Measures"]

    def as_json(self) -> dict[str, Any]:
        """For summary.json."""
        return asdict(self)


def acc_at_k(correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """The chance that of k of a problem's n answers, drawn without replacement, one or more is right.

    1 - C(n - c, k) / C(n, k) with c right answers: "pass@k" of Chen et al. 2021 (arXiv 2107.03374), equation 1, in the
    form that neither overflows nor cancels.

    Args:
        correct: ``[P, n]`` verdicts.
        k: 1 to n; n: any of them.

    Returns:
        ``[P]``.
    """
    correct = np.asarray(correct, dtype=bool)
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k is 1 to {n}, not {k}")
    wrong = n - correct.sum(axis=1)
    missed = np.ones(len(correct))
    for drawn in range(k):
        missed *= np.maximum(wrong - drawn, 0) / (n - drawn)
    return 1 - missed


def measure(
    correct: ArrayLike,
    majority: ArrayLike,
    *,
    unanswered: ArrayLike,
    cut: ArrayLike,
    tokens: ArrayLike,
    groups: Sequence[str] = (),
) -> Measures:
    """Measure one benchmark.

    Args:
        correct, unanswered, cut: ``[P, n]`` booleans.
        majority: ``[P]`` booleans.
        tokens: ``[P, n]`` numbers of tokens.
        groups: P names, "" where a problem has none; () for no groups.
    """
    correct, majority = np.asarray(correct, dtype=bool), np.asarray(majority, dtype=bool)
    unanswered, cut, tokens = np.asarray(unanswered), np.asarray(cut), np.asarray(tokens)
    by_group: dict[str, Measures] = {}
    names = np.asarray(groups)
    for name in sorted(set(groups) - {""}, key=_by_number):
        rows = names == name
        by_group[name] = measure(
            correct[rows], majority[rows], unanswered=unanswered[rows], cut=cut[rows], tokens=tokens[rows]
        )
    n = correct.shape[1]
    return Measures(
        problems=len(correct),
        n=n,
        acc_1=mean_interval(acc_at_k(correct, 1)),
        acc_n=mean_interval(acc_at_k(correct, n)),
        majority=mean_interval(majority),
        acc_k=tuple(float(acc_at_k(correct, k).mean()) for k in range(1, n + 1)),
        unanswered=float(unanswered.mean()),
        cut=float(cut.mean()),
        tokens=float(tokens.mean()),
        groups=by_group,
    )


def _by_number(name: str) -> tuple[float, str]:
    """Levels in their order: 10 behind 9."""
    return (float(name), name) if name.isdecimal() else (float("inf"), name)
