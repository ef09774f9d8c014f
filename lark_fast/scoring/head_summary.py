"""What a sample of positions has cost and saved, read from the finished scores; see ``head_sampling``."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from lark_fast.scoring.metrics import json_number
from lark_fast.scoring.parts import part_files, reading

if TYPE_CHECKING:
    from lark_fast.flop import ForwardCost


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSummary:
    """Over the trajectories of a scores directory; NaN: there is none.

    Attributes:
        head_share: of the scored positions, those that met the head.
        nll_error, brier_error: standard error over value, the median; of the Brier score that rho is made of.
        flop_saved: of the FLOP of a forward pass with the head on all scored positions, the share that was left out.
    """

    head_share: float
    nll_error: float
    brier_error: float
    flop_saved: float

    def lines(self) -> list[str]:
        """For people."""
        if math.isnan(self.head_share):
            return []
        return [
            f"{self.head_share:.1%} of the scored positions met the head, {self.flop_saved:.0%} of the FLOP saved; "
            f"standard error, median: {self.nll_error:.1%} of nll, {self.brier_error:.1%} of the Brier score"
        ]

    def as_json(self) -> dict[str, Any]:
        """Flat, by name; what is not known is None."""
        return {f"sample_{name}": json_number(getattr(self, name)) for name in HEAD_SUMMARY}


HEAD_SUMMARY = tuple(field.name for field in fields(HeadSummary))


def read_head_summary(directory: str | Path, cost: "ForwardCost", brier: str) -> HeadSummary:
    """Sum up the rows of a scores directory, 16 bytes of memory each.

    Args:
        directory: of the scores.
        cost: of the student.
        brier: name of the Brier score that rho is made of.

    Raises:
        UserError: a part cannot be read.
    """
    names = ["n_input_tokens", "n_tokens", "n_head", "nll", "nll_se", brier, f"{brier}_se"]
    n_tokens, n_head, flop, full = 0, 0, 0.0, 0.0
    errors: list[tuple[np.ndarray, np.ndarray]] = []
    for part in part_files(directory):
        with reading(part):
            table = pq.read_table(part, columns=names)
        lengths, scored, met, nll, nll_se, score, score_se = (table[name].to_numpy() for name in names)
        n_tokens, n_head = n_tokens + int(scored.sum()), n_head + int(met.sum())
        flop, full = flop + cost.flop(lengths, int(met.sum())), full + cost.flop(lengths, int(scored.sum()))
        with np.errstate(divide="ignore", invalid="ignore"):
            errors.append((nll_se / nll, score_se / score))
    if not n_tokens:
        return HeadSummary(**dict.fromkeys(HEAD_SUMMARY, math.nan))
    nll_error, brier_error = (_median(np.concatenate(column)) for column in zip(*errors, strict=True))
    return HeadSummary(
        head_share=n_head / n_tokens, nll_error=nll_error, brier_error=brier_error, flop_saved=1 - flop / full
    )


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan
