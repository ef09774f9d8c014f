"""lark-fast: learnability-based trajectory selection for reasoning distillation (LARK, arXiv 2605.30651)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lark_fast.kernels.chi2 import Chi2Solution, chi2_solve, chi2_weights
    from lark_fast.kernels.linear_cross_entropy import linear_cross_entropy
    from lark_fast.kernels.token_stats import TokenStats, token_stats, token_stats_from_logits
    from lark_fast.kernels.trajectory_reduce import trajectory_reduce
    from lark_fast.scoring.learnability import g_hat
    from lark_fast.scoring.scorer import Scorer, TrajectoryScore
    from lark_fast.scoring.stream import ScoringQueue

_HOMES = {
    "Scorer": "lark_fast.scoring.scorer",
    "TrajectoryScore": "lark_fast.scoring.scorer",
    "ScoringQueue": "lark_fast.scoring.stream",
    "TokenStats": "lark_fast.kernels.token_stats",
    "token_stats": "lark_fast.kernels.token_stats",
    "token_stats_from_logits": "lark_fast.kernels.token_stats",
    "trajectory_reduce": "lark_fast.kernels.trajectory_reduce",
    "linear_cross_entropy": "lark_fast.kernels.linear_cross_entropy",
    "chi2_weights": "lark_fast.kernels.chi2",
    "chi2_solve": "lark_fast.kernels.chi2",
    "Chi2Solution": "lark_fast.kernels.chi2",
    "g_hat": "lark_fast.scoring.learnability",
}
__all__ = [  # noqa: RUF022 - the order a reader meets them
    "Scorer",
    "TrajectoryScore",
    "ScoringQueue",
    "TokenStats",
    "g_hat",
    "chi2_weights",
    "chi2_solve",
    "Chi2Solution",
    "token_stats",
    "token_stats_from_logits",
    "trajectory_reduce",
    "linear_cross_entropy",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first asked for, so that ``import lark_fast`` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
