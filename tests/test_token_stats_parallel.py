"""The vocabulary-parallel head: ranks in processes of their own, over gloo, against one process and float64."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lark_fast.kernels.token_stats import IGNORE_INDEX, TokenStats, token_stats, token_stats_naive
from lark_fast.kernels.token_stats_parallel import token_stats_vocab_parallel
from tests.test_token_stats import DEVICE, assert_close, assert_same_bits, assert_same_order, problem

WORDS = (130, 71)  # of rank 0 and 1: neither a multiple of a tile, and not equal


def operands(dtype):
    hidden, weight, labels = (tensor.cpu() for tensor in problem(37, 24, sum(WORDS), 4.0, dtype=dtype))
    weight[WORDS[0] + 3] = weight[5]  # equal logits on both ranks
    labels[:2] = torch.tensor([5, WORDS[0] + 3])
    labels[7] = IGNORE_INDEX
    hidden[11, 0] = float("nan")
    return hidden.mul(4).round(), weight.mul(4).round(), labels, torch.linspace(-1, 1, sum(WORDS)).mul(8).round() / 8


def rank_main(rank, store, dtype, impl, statistics, rows, top_k):
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}/rendezvous", rank=rank, world_size=len(WORDS))
    hidden, weight, labels, bias = operands(dtype)
    start = sum(WORDS[:rank])
    words = slice(start, start + WORDS[rank])
    rest = {"rows": rows, "statistics": statistics, "impl": impl, "top_k": top_k}
    if top_k:
        rest["sizes"] = WORDS
    labels = labels if rows is None else labels[rows]
    torch.save(
        token_stats_vocab_parallel(hidden, weight[words], labels, bias=bias[words], **rest), f"{store}/{rank}.pt"
    )
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("dtype", "impl", "statistics", "rows", "top_k"),
    [
        # More than one rank has words, fewer than both.
        (torch.float32, "torch", ("brier", "entropy"), None, 80),
        (torch.bfloat16, "fused", ("brier", "entropy", "rank"), None, None),
        (torch.float32, "chunked", ("nll", "brier"), torch.tensor([3, 3, 11, 7, 0, 1, 36]), None),
    ],
    ids=["torch", "fused", "chunked"],
)
def test_two_ranks_give_what_one_gives(tmp_path, dtype, impl, statistics, rows, top_k):
    mp.spawn(rank_main, (str(tmp_path), dtype, impl, statistics, rows, top_k), nprocs=len(WORDS))
    with torch.serialization.safe_globals([TokenStats]):
        first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(WORDS)))
    assert_same_bits(first, second)
    hidden, weight, labels, bias = operands(dtype)
    labels = labels if rows is None else labels[rows]
    truth = token_stats_naive(hidden, weight, labels, rows=rows, bias=bias, statistics=statistics, top_k=top_k)
    assert_close(first, truth)
    assert_same_order(first, truth)
    hidden, weight, labels, bias = (tensor.to(DEVICE) for tensor in (hidden, weight, labels, bias))
    rows = None if rows is None else rows.to(DEVICE)
    alone = token_stats(hidden, weight, labels, rows=rows, bias=bias, statistics=statistics, impl=impl)
    torch.testing.assert_close(first.nll, alone.nll.cpu(), equal_nan=True)
