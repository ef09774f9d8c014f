"""Errors of token statistics against float64, and what they may be.

Three errors a statistic: norm(out - truth) / norm(truth), the largest absolute one, and the first over the tokens with
p > 0.99 alone, whose nll and Brier score vanish in the norm of the others. The budget is the error of eager torch on
the same operands: a tenth of it for bf16 and fp16, whose logits eager rounds to that dtype; twice it for float32, where
both round the same products. No budget is below what float32 sums can hold.
"""

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.eager import eager_stats
from lark_fast.kernels.softmax_sums import TokenStats

STATISTICS = ("nll", "brier", "entropy", "rank", "agreement", "brier_topk")
CONFIDENT = -math.log(0.99)  # nll below which a token is
ERRORS = ("error", "largest_error", "confident_error")
# Of floats: (in roundings of the largest logit, which move a probability by as much; of float32 sums). The second is
# relative to the largest value where the error is absolute.
ROUNDING = 2.0**-24
FLOORS = {"error": (2.0, 2e-6), "largest_error": (8.0, 4e-6), "confident_error": (8.0, 1e-5)}
# Two logits closer than float32 can tell may swap: a place or two in a thousand, and agreement in one of a hundred.
RANK_FLOORS = {"error": 1e-3, "largest_error": 2.0, "confident_error": 0.0}
AGREEMENT_FLOORS = {"error": 0.1, "largest_error": 1.0, "confident_error": 0.0}


def judge(
    out: TokenStats, truth: TokenStats, logits: Tensor, labels: Tensor, dtype: torch.dtype, top_k: int | None = None
) -> list[dict]:
    """One entry a statistic: its errors, their budgets and ``ok``.

    Args:
        out: what is judged; where ``truth`` has NaN (rank 0, agreement False), so must it.
        truth: of the same tokens, in float64; a statistic that is None must be None in ``out``.
        logits: ``[T, V]``, what eager torch makes of the same operands.
        labels: ``[T]``.
        dtype: of the operands.
        top_k: that of ``brier_topk``.
    """
    eager = eager_stats(logits, labels.clamp(min=0), top_k)
    largest_logit = logits[logits.isfinite()].abs().max().item()
    whole = truth.nll.isfinite()
    confident = whole & (truth.nll < CONFIDENT)
    entries = []
    for name in STATISTICS:
        values, exact = getattr(out, name), getattr(truth, name)
        if exact is None and values is None:
            continue
        entry = {"statistic": name, **dict.fromkeys(ERRORS), "ok": False}
        entries.append(entry)
        if problem := _problem(values, exact, whole):
            entry["problem"] = problem
            continue
        own = _errors(values, exact, whole, confident)
        eager_errors = _errors(getattr(eager, name), exact, whole, confident)
        allowed = _budgets(name, exact[whole], eager_errors, largest_logit, dtype)
        entry.update(own, **allowed, ok=all(own[e] is None or own[e] <= allowed[_budget_of(e)] for e in ERRORS))
    return entries


def assert_right(out: TokenStats, truth: TokenStats, *others: Any) -> None:
    """Fails with the statistics that miss their budgets; arguments as ``judge``."""
    wrong = [entry for entry in judge(out, truth, *others) if not entry["ok"]]
    assert not wrong, wrong


def _problem(values: Tensor | None, exact: Tensor | None, whole: Tensor) -> str | None:
    if values is None or exact is None:
        return "missing" if values is None else "not asked for"
    if values.shape != exact.shape:
        return f"shape {list(values.shape)}, not {list(exact.shape)}"
    if not values[whole].isfinite().all():
        return "not finite where it should be"
    blank = values[~whole].isnan() if values.is_floating_point() else values[~whole] == 0
    return None if blank.all() else "a number on a row that is ignored or broken"


def _errors(values: Tensor, exact: Tensor, whole: Tensor, confident: Tensor) -> dict[str, float | None]:
    difference, exact = (values.double() - exact.double()).abs(), exact.double()

    def norm_ratio(tokens: Tensor) -> float | None:
        if not tokens.any():
            return None
        norm = exact[tokens].norm().item()
        return difference[tokens].norm().item() / norm if norm else difference[tokens].norm().item()

    largest = difference[whole].max().item() if whole.any() else None
    return {"error": norm_ratio(whole), "largest_error": largest, "confident_error": norm_ratio(confident)}


def _budgets(
    name: str, exact: Tensor, eager: dict[str, float | None], largest_logit: float, dtype: torch.dtype
) -> dict[str, float]:
    floors = {"rank": RANK_FLOORS, "agreement": AGREEMENT_FLOORS}.get(name)
    if floors is None:
        largest = exact.abs().max().item() if len(exact) else 0.0
        scales = {"error": 1.0, "largest_error": largest, "confident_error": 1.0}
        floors = {e: roundings * ROUNDING * largest_logit + sums * scales[e] for e, (roundings, sums) in FLOORS.items()}
    share = 2.0 if dtype in (torch.float32, torch.float64) else 0.1
    finite = {e: value if value is not None and math.isfinite(value) else 0.0 for e, value in eager.items()}
    return {_budget_of(e): max(share * finite[e], floors[e]) for e in ERRORS}


def _budget_of(error: str) -> str:
    return "budget" if error == "error" else error.replace("_error", "_budget")
