"""A whole scoring pass beside the machine's ceiling, and beside the two usual ways of taking it.

The limit is the pass's own FLOP (``forward_flop``) at the speed of a large square matrix product.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.comparison import DEVICE, ceiling, compare
from benchmarks.eager import eager_topk
from benchmarks.workload import QWEN_HALF_B, QWEN_VOCABULARY, SMALL, forward_flop, short_answers, student
from lark_fast import Scorer
from lark_fast.pool.records import NOT_SCORED
from lark_fast.rendering.renderer import Rendered

TOP_K = 50
LONG_RECORD = 4000
PADDED_BATCH = 8
if DEVICE.type == "cuda":
    STUDENTS = [(QWEN_HALF_B, QWEN_VOCABULARY, 256, torch.bfloat16)]
    LONG_STUDENT, LONG_DTYPE = QWEN_HALF_B, torch.bfloat16
else:
    STUDENTS = [
        (SMALL, 8192, 24, torch.float32),
        (SMALL, 8192, 24, torch.bfloat16),
        (SMALL, QWEN_VOCABULARY, 6, torch.float32),
    ]
    # Its logits are as large as any student's with this vocabulary; the rest only takes time.
    LONG_STUDENT, LONG_DTYPE = SMALL | {"hidden_size": 64, "num_hidden_layers": 2}, torch.float32


def records(n, vocabulary):
    rng = np.random.default_rng(0)
    return [record(rng.integers(0, vocabulary, p + a).tolist(), p) for p, a in zip(*short_answers(n), strict=True)]


def record(ids, n_prompt):
    return Rendered(input_ids=ids, labels=[NOT_SCORED] * n_prompt + ids[n_prompt:], truncated=False)


def eager_score(logits, item):
    """(mean nll, mean top-k Brier) of a record from its logits [T, V]."""
    end = len(item.input_ids)
    start = end - item.n_scored
    labels = torch.tensor(item.input_ids[start:], device=DEVICE)
    return [mean.mean().item() for mean in eager_topk(logits[start - 1 : end - 1], labels, TOP_K)]


@torch.no_grad()
def one_at_a_time(model, rendered):
    """A forward pass a record, with all its logits, as the released code takes it."""
    scores = []
    for item in rendered:
        logits = model(input_ids=torch.tensor([item.input_ids], device=DEVICE), use_cache=False).logits
        scores.append(eager_score(logits[0], item))
    return scores


@torch.no_grad()
def padded_batches(model, rendered):
    """Batches in the order of the records, padded under an attention mask."""
    scores = []
    for first in range(0, len(rendered), PADDED_BATCH):
        batch = rendered[first : first + PADDED_BATCH]
        sequences = [torch.tensor(item.input_ids) for item in batch]
        ids = pad_sequence(sequences, batch_first=True).to(DEVICE)
        mask = pad_sequence([torch.ones_like(row) for row in sequences], batch_first=True).to(DEVICE)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        scores += [eager_score(row, item) for row, item in zip(logits, batch, strict=True)]
    return scores


@pytest.mark.parametrize(("sizes", "vocabulary", "n", "dtype"), STUDENTS)
def test_scoring_pass(benchmark, sizes, vocabulary, n, dtype):
    model, rendered = student(sizes, vocabulary, dtype), records(n, vocabulary)
    scorer = Scorer(model, top_k=TOP_K)

    def check(results):
        # Eager logits of a bfloat16 model are rounded to it, ours are not.
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        ours = [(score.nll, score.brier_topk) for score in results.pop("ours")]
        for scores in results.values():
            np.testing.assert_allclose(ours, scores, rtol=tolerance)

    product, product_flop = ceiling(dtype)
    lengths = [len(item.input_ids) for item in rendered]
    n_scored = sum(item.n_scored for item in rendered)
    compare(
        benchmark,
        f"scoring pass, top-k {TOP_K}",
        lambda: scorer.score_rendered(rendered),
        limit=product,
        limit_scale=forward_flop(model, lengths, n_scored) / product_flop,
        peers={
            "one record at a time": lambda: one_at_a_time(model, rendered),
            "padded batches": lambda: padded_batches(model, rendered),
        },
        check=check,
        shape=f"{n} records, {sum(lengths)} tokens, D={model.config.hidden_size} V={vocabulary}",
        dtype=str(dtype).removeprefix("torch."),
    )


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
