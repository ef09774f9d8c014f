"""What bfloat16 costs in accuracy, measured on the first trajectories of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lark_fast.memory import available_memory
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


def rounding_cost(
    scorer: "Scorer", items: Sequence[Trajectory], trust_remote_code: bool = False
) -> RoundingCost | None:
    """Score a sample in the scorer's own precision and, by the same student loaded anew, in float32.

    Args:
        scorer: of a student in lower precision, which knows where it was loaded from.
        items: trajectories; as many of the first as make a sample.
        trust_remote_code: as the scorer's student was loaded.

    Returns:
        None where there is nothing to score, or where the student cannot be had in float32: a gauge stops no run.
    """
    from lark_fast.errors import UserError
    from lark_fast.scoring.scorer import Scorer
    from lark_fast.student import load_student

    n_parameters = sum(parameter.numel() for parameter in scorer.student.model.parameters())
    sizes = np.cumsum([len(item.input_ids) for item in items[:SAMPLE]])
    sample = items[: max(1, int(np.searchsorted(sizes, SAMPLE_TOKENS, side="right")))]
    if not sample or 4 * n_parameters > available_memory() / 2:
        return None
    try:
        loaded = load_student(
            scorer.student.files,
            device="cpu",
            dtype="float32",
            trust_remote_code=trust_remote_code,
            tokenizer=False,
            quiet=True,
        )
    except (UserError, MemoryError):
        return None
    exact = Scorer(loaded, head_share=scorer.head_share)
    rows = np.array(
        [[(one.nll, one.brier) for one in each.score_rendered(sample)] for each in (scorer, exact)]
    )  # [2, N, 2]
    apart = np.abs(rows[0] - rows[1]) / np.maximum(np.abs(rows[1]), 1e-30)
    (nll, brier) = ((float(np.sqrt((column**2).mean())), float(column.max())) for column in apart.T)
    return RoundingCost(trajectories=len(sample), nll=nll, brier=brier)
