"""Trajectories whose nll is measured before and after training: how fast each was learnt, for rho to be judged by.

loss_delta = mean_t(nll_before - nll_after), and rho_measured is ``measured_rate`` of the means.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from lark_fast.files import atomic_path
from lark_fast.scoring.learnability import measured_rate
from lark_fast.training.data import TrainingSet
from lark_fast.training.step import reduce_nll

FILE = "probe.parquet"


def write_probe(out: Path, data: TrainingSet, before: Tensor, after: Tensor, steps: int) -> str:
    """Write probe.parquet, a row a trajectory.

    Args:
        out: directory.
        data: the probe's N trajectories.
        before: nll of every scored token before training.
        after: the same behind it.
        steps: between the two.

    Returns:
        What it says, in a line.
    """
    was = reduce_nll(before, data).means.nll
    now = reduce_nll(after, data, before)
    rate = measured_rate(was.numpy(), now.means.nll.numpy(), steps)
    problems, candidates = zip(*data.keys, strict=True)
    table = pa.table(
        {
            "problem_id": problems,
            "candidate_id": candidates,
            "source": data.sources,
            "line": data.lines,
            "n_tokens": data.n_scored,
            "nll_before": was.numpy(),
            "nll_after": now.means.nll.numpy(),
            "loss_delta": now.means.loss_delta.numpy(),
            "rho_measured": rate,
        }
    )
    with atomic_path(out / FILE) as temporary:
        pq.write_table(table, temporary)
    better = int((now.means.loss_delta > 0).sum())
    quartiles = np.nanquantile(rate, [0.25, 0.5, 0.75]) if np.isfinite(rate).any() else [float("nan")] * 3
    return (
        f"probe: nll fell on {better:,} of {len(data):,} trajectories, at the median by {quartiles[1]:.2e} of itself a "
        f"step (quartiles {quartiles[0]:.2e}, {quartiles[2]:.2e}): {FILE}"
    )
