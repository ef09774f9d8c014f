"""A whole scoring pass beside the machine's ceiling and its peers, and the memory of a long record."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.comparison import DEVICE, compare_workload
from benchmarks.passes import PASSES, TOP_K, one_at_a_time, record, records
from benchmarks.workload import QWEN_HALF_B, QWEN_VOCABULARY, SMALL, student
from lark_fast import Scorer

LONG_RECORD = 4000
if DEVICE.type == "cuda":
    LONG_STUDENT, LONG_DTYPE = QWEN_HALF_B, torch.bfloat16
else:
    # Its logits are as large as any student's with this vocabulary; the rest only takes time.
    LONG_STUDENT, LONG_DTYPE = SMALL | {"hidden_size": 64, "num_hidden_layers": 2}, torch.float32


@pytest.mark.parametrize("case", PASSES, ids=str)
def test_scoring_pass(benchmark, case):
    compare_workload(benchmark, case.build())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak memory")
def test_extra_memory_of_a_long_record(benchmark):
    ours = benchmark.pedantic(in_fresh_process, args=("ours",))
    eager = in_fresh_process("eager")
    benchmark.extra_info.update(
        name="extra peak memory",
        shape=f"1 record, {LONG_RECORD} tokens, D={LONG_STUDENT['hidden_size']} V={QWEN_VOCABULARY}",
        dtype=str(LONG_DTYPE).removeprefix("torch."),
        device=DEVICE.type,
        extra_memory_mib=ours,
        memory_ratio={"one record at a time": eager / ours},
    )


def in_fresh_process(way):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return pool.submit(extra_memory_mib, way).result()


def extra_memory_mib(way):
    """How far memory rises over the model's own while one long record is scored."""
    model = student(LONG_STUDENT, QWEN_VOCABULARY, LONG_DTYPE)
    scorer = Scorer(model, top_k=TOP_K)
    score = scorer.score_rendered if way == "ours" else lambda rendered: one_at_a_time(model, rendered)
    score(records(1, QWEN_VOCABULARY))  # libraries and thread pools come in here
    long = record(np.random.default_rng(0).integers(0, QWEN_VOCABULARY, LONG_RECORD).tolist(), 100)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        score([long])
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Not ru_maxrss: Linux starts a child's at its parent's peak, and building the model has a peak of its own.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib("VmRSS")
    score([long])
    return resident_mib("VmHWM") - before


def resident_mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
