"""``linear_cross_entropy``, forward and backward, beside its three bare matrix products and its peers."""

import pytest

from benchmarks import loss, timing
from benchmarks.comparison import DEVICE, compare_workload


@pytest.mark.parametrize("shape", loss.SHAPES, ids=str)
def test_linear_cross_entropy(benchmark, shape):
    workload = loss.workload(*shape)
    compare_workload(benchmark, workload)
    if DEVICE.type == "cuda":
        runs = {"ours": lambda: workload.ours("auto"), **workload.peers}
        benchmark.extra_info["extra_memory_mib"] = {name: timing.extra_memory_mib(run) for name, run in runs.items()}
