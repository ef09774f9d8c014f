"""A policy of one's own: which of a problem's candidates get weight, and how much.

    lark-fast select --scores scores/ --out selection/ --policy custom_policy:short_first     # from this folder
    python examples/custom_policy.py [scores/ OUT]     # beside chi2; without arguments on scores made here

A policy sees all problems at once, as padded arrays.
"""

import sys

import numpy as np
from numpy.typing import NDArray

from lark_fast.selection.policies import PolicyOptions


def short_first(columns: dict[str, NDArray[np.float64]], options: PolicyOptions) -> NDArray[np.float64]:
    """g_hat decides, but only among the shorter half: of these the best ``budget``, a weight that falls with rank.

    Args:
        columns: g_hat, nll, n_tokens, ..., each ``[problems, candidates]``, NaN where there is no candidate.
        options: with ``budget`` and ``tau`` as they were asked for.

    Returns:
        ``[problems, candidates]`` weights of any scale; each problem's are made to sum to 1.
    """
    g_hat, n_tokens = columns["g_hat"], columns["n_tokens"]
    short = n_tokens <= np.nanmedian(n_tokens, axis=1, keepdims=True)
    best_first = np.argsort(np.where(short, -g_hat, np.inf), axis=1, kind="stable")  # NaN, no candidate, comes last
    rank = np.argsort(best_first, axis=1)
    return np.where(short & (rank < options.budget), 1 / (1 + rank), 0.0)


def compare(scores: str, out: str) -> None:
    """Select with it and with chi2; tables of both."""
    from lark_fast.selection.run import SelectConfig, sweep

    own = "custom_policy:short_first"
    _, tables = sweep(SelectConfig(scores=scores, out=out, budget=2, sweep=(f"policy=chi2,{own}",), overwrite=True))
    print(tables)


def example() -> None:
    """The same on scores made here."""
    import tiny

    from lark_fast.scoring.run import ScoreConfig, score_pool

    scores = f"{tiny.FOLDER}/policy-scores"
    score_pool(ScoreConfig(pool=(tiny.pool(),), student=tiny.student(), out=scores))
    compare(scores, f"{tiny.FOLDER}/policies")


if __name__ == "__main__":
    compare(*sys.argv[1:]) if sys.argv[1:] else example()
