"""Another program's scorer, answered by lark-fast: LARK's released ``score_one``, same arguments, same (L, Brier).

A program that calls ``lark.score_lark.score_one`` needs one line: ``lark.score_lark.score_one = score_one``.

    python examples/patch_scorer.py [STUDENT]     # puts it under a loop that knows nothing of it, and compares
"""

import sys
import types
from functools import lru_cache

import torch
import torch.nn.functional as F

from lark_fast import Scorer

scorer_of = lru_cache(maxsize=1)(lambda model, top_k: Scorer(model, top_k=top_k))


def score_one(model, input_ids, asst_start, asst_end, top_k, device):  # noqa: ANN001, ANN201 - the reference's signature
    """Mean nll and top-k Brier score of tokens [asst_start, asst_end); None where there is none."""
    if asst_end <= asst_start:
        return None
    labels = [-100] * asst_start + list(input_ids[asst_start:asst_end]) + [-100] * (len(input_ids) - asst_end)
    stats = scorer_of(model, top_k).score_tokens(input_ids, labels)
    return stats.nll.mean().item(), stats.brier_topk.mean().item()


@torch.no_grad()
def with_logits(model, input_ids, asst_start, asst_end, top_k, device):  # noqa: ANN001, ANN201 - as above
    """What stands in such programs: logits of the whole vocabulary for every token."""
    logits = model(torch.tensor([input_ids], device=device)).logits[0, asst_start - 1 : asst_end - 1].float()
    labels = torch.tensor(input_ids[asst_start:asst_end], device=device)
    top, words = logits.topk(min(top_k, logits.shape[1]))
    p = top.softmax(1)
    brier = 1 - 2 * (p * (words == labels[:, None])).sum(1) + p.square().sum(1)
    return F.cross_entropy(logits, labels).item(), brier.mean().item()


def main(student: str) -> None:
    """Run somebody's loop twice, the second time patched."""
    import tiny
    from transformers import AutoModelForCausalLM, AutoTokenizer

    program = types.SimpleNamespace(score_one=with_logits)  # stands for the module lark.score_lark
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student).eval(), AutoTokenizer.from_pretrained(student)
    pairs = [(tokenizer(row["question"])["input_ids"], tokenizer(row["answer"])["input_ids"]) for row in tiny.answers()]
    found = {}
    for name, own in (("before", program.score_one), ("patched", score_one)):
        program.score_one = own
        found[name] = [program.score_one(model, [*q, *a], len(q), len(q) + len(a), 50, "cpu") for q, a in pairs]
    for row, *numbers in list(zip(tiny.answers(), *found.values(), strict=True))[:8]:
        told = [f"{name} {nll:.6f} {brier:.6f}" for name, (nll, brier) in zip(found, numbers, strict=True)]
        print(f"{row['question']:<16} {row['teacher']:<8}", *told)
    difference = (torch.tensor(found["before"]) - torch.tensor(found["patched"])).abs().max().item()
    print(f"of {len(pairs)} answers, the largest difference: {difference:.1e}")


if __name__ == "__main__":
    import tiny

    main(*(sys.argv[1:] or [tiny.student()]))
