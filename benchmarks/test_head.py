"""``token_stats``, the scoring head, beside the bare matrix product of its shapes, and what starts from logits.

Shapes, peers, limits and their formulas: head.py.
"""

import pytest
import torch

from benchmarks import head
from benchmarks.comparison import compare_workload


@pytest.mark.parametrize(("T", "D", "V", "dtype"), head.SHAPES)
@torch.no_grad()
def test_all_statistics(benchmark, T, D, V, dtype):
    compare_workload(benchmark, head.head(T, D, V, dtype))


@pytest.mark.parametrize(("T", "D", "V", "dtype"), head.SHAPES)
@torch.no_grad()
def test_nll_and_brier(benchmark, T, D, V, dtype):
    compare_workload(benchmark, head.head(T, D, V, dtype, statistics=head.NLL_BRIER))


@pytest.mark.parametrize(("T", "D", "V", "dtype"), head.SHAPES)
@torch.no_grad()
def test_top_k(benchmark, T, D, V, dtype):
    compare_workload(benchmark, head.head(T, D, V, dtype, top_k=head.TOP_K))


@torch.no_grad()
def test_some_rows(benchmark):
    compare_workload(benchmark, head.scored_rows(*head.SHAPES[0]))


@pytest.mark.parametrize(("T", "V", "dtype"), head.LOGITS_SHAPES)
@torch.no_grad()
def test_from_logits(benchmark, T, V, dtype):
    compare_workload(benchmark, head.from_logits(T, V, dtype))
