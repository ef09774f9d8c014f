"""``trajectory_reduce`` beside a copy of its inputs: trajectories.py."""

from benchmarks import trajectories
from benchmarks.comparison import compare_workload


def test_trajectory_reduce(benchmark):
    compare_workload(benchmark, trajectories.reduction())
