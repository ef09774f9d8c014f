"""What bfloat16 costs in accuracy, measured on the first trajectories of a run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lark_fast.scoring.feed import Trajectory

if TYPE_CHECKING:
    from lark_fast.scoring.scorer import Scorer

SAMPLE = 32  # trajectories
SAMPLE_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingCost:
    """Relative differences of a sample's scores in bfloat16 from those in float32: root mean square and largest."""

    trajectories: int
    nll: tuple[float, float]
    brier: tuple[float, float]

    def __str__(self) -> str:
        scores = (("nll", self.nll), ("the Brier score", self.brier))
        parts = (f"{name} by {100 * mean:.1g} % ({100 * most:.1g} % at most)" for name, (mean, most) in scores)
        return f"{' and '.join(parts)} on the first {self.trajectories} trajectories"


def rounding_cost(scorer: "Scorer", student: str, items: Sequence[Trajectory]) -> RoundingCost | None:
    """Score a sample in the scorer's own precision and, by the same student loaded anew, in float32.

    Args:
        scorer: of the student in lower precision.
        student: directory or hub id to load it from.
        items: trajectories; as many of the first as make a sample.

    Returns:
        None where there is nothing to score or no memory for the student in float32.
    """
    from lark_fast.scoring.scorer import Scorer
    from lark_fast.student import load_student

    n_parameters = sum(parameter.numel() for parameter in scorer.student.model.parameters())
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = np.cumsum([len(item.input_ids) for item in items[:SAMPLE]])
    sample = items[: max(1, int(np.searchsorted(sizes, SAMPLE_TOKENS, side="right")))]
    if not sample or 4 * n_parameters > available / 2:
        return None
    exact = Scorer(load_student(student, device="cpu", dtype="float32", tokenizer=False))
    rows = np.array(
        [[(one.nll, one.brier) for one in each.score_rendered(sample)] for each in (scorer, exact)]
    )  # [2, N, 2]
    apart = np.abs(rows[0] - rows[1]) / np.maximum(np.abs(rows[1]), 1e-30)
    (nll, brier) = ((float(np.sqrt((column**2).mean())), float(column.max())) for column in apart.T)
    return RoundingCost(trajectories=len(sample), nll=nll, brier=brier)
