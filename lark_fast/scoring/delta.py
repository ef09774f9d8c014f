"""What the finished scores of two states of a student say: how much was learnt, and whether rho had told so."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark_fast.ranks import rank_correlations
from lark_fast.scoring.metrics import json_number
from lark_fast.scoring.parts import part_files, reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What lies between two states of a student, over the trajectories of a scores directory; NaN: not known.

    Attributes:
        steps: between the two, as ``rho_measured`` has it.
        loss_delta: its mean, nats.
        improved: the share of trajectories whose nll fell.
        spearman: rank correlation of rho, the proxy, with rho_measured, over all trajectories.
        spearman_within: among the candidates of a problem, the mean over problems.
        problems: over how many.
    """

    steps: int
    loss_delta: float
    improved: float
    spearman: float
    spearman_within: float
    problems: int

    def lines(self) -> list[str]:
        """For people."""
        if math.isnan(self.loss_delta):
            return []
        lines = [
            f"after {self.steps:,} step{'s' * (self.steps != 1)}: nll fell on {self.improved:.1%} of the trajectories; "
            f"the mean of all is {abs(self.loss_delta):.3g} nats {'lower' if self.loss_delta > 0 else 'higher'}"
        ]
        if math.isfinite(self.spearman):
            among = f", {self.spearman_within:+.2f} within problems ({self.problems:,})" if self.problems else ""
            lines.append(f"rho against rho_measured, Spearman: {self.spearman:+.2f} over all{among}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Flat, by name; what is not known is None."""
        return {f"paired_{name}": json_number(getattr(self, name)) for name in DELTA}


DELTA = tuple(field.name for field in fields(Delta))


def read_delta(directory: str | Path, steps: int) -> Delta:
    """Sum up the rows of a finished scores directory of a pair, some 60 bytes of memory each.

    Raises:
        UserError: a part cannot be read.
    """
    names, tables = ["problem_id", "rho", "loss_delta", "rho_measured"], []
    for part in part_files(directory):
        with reading(part):
            tables.append(pq.read_table(part, columns=names, read_dictionary=names[:1]))
    if not tables:
        return Delta(steps=steps, problems=0, **dict.fromkeys(DELTA[1:-1], math.nan))
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    problem = table["problem_id"].combine_chunks().indices.to_numpy()
    rho, delta, measured = (table[name].to_numpy() for name in names[1:])
    delta = delta[np.isfinite(delta)]
    known = np.isfinite(rho) & np.isfinite(measured)
    rho, measured = rho[known], measured[known]
    overall = rank_correlations(rho, measured, np.zeros(len(rho)))
    within = rank_correlations(rho, measured, problem[known])
    return Delta(
        steps=steps,
        loss_delta=_mean(delta),
        improved=_mean(delta > 0),
        spearman=_mean(overall),
        spearman_within=_mean(within),
        problems=len(within),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
