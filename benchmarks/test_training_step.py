"""A training step beside the machine's ceiling, ours without packing, a plain loop and TRL's trainer."""

from dataclasses import replace
from functools import partial

import pytest

from benchmarks.comparison import compare_workload
from benchmarks.training import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_step(benchmark, case):
    workload = case.build()
    others = [impl for impl in workload.implementations if impl != "packed"]
    for impl in others:
        workload.check(workload.ours(impl))
    peers = {f"ours, {impl}": partial(workload.ours, impl) for impl in others}
    compare_workload(benchmark, replace(workload, peers=peers | workload.peers))
