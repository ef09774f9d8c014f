"""LARK's released ``score_one``, answered by lark-fast: same arguments, same (L, Brier), no [T, V] logits.

A program that calls ``lark.score_lark.score_one`` needs one line: ``lark.score_lark.score_one = score_one``.
"""

from functools import lru_cache

from lark_fast import Scorer

scorer_of = lru_cache(maxsize=1)(lambda model, top_k: Scorer(model, top_k=top_k))


def score_one(model, input_ids, asst_start, asst_end, top_k, device):  # noqa: ANN001, ANN201 - the reference's signature
    """Mean nll and top-k Brier score of tokens [asst_start, asst_end); None where there is none."""
    if asst_end <= asst_start:
        return None
    labels = [-100] * asst_start + list(input_ids[asst_start:asst_end]) + [-100] * (len(input_ids) - asst_end)
    stats = scorer_of(model, top_k).score_tokens(input_ids, labels)
    return stats.nll.mean().item(), stats.brier_topk.mean().item()
