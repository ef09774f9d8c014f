"""A training step beside a plain loop over the same padded micro-batches.

FLOP of the limit: 3 x ``forward_flop`` (forward, and twice that backward), at the speed of a large square product.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.comparison import DEVICE, ceiling, compare
from benchmarks.workload import QWEN_VOCABULARY, SMALL, short_answers, student
from lark_fast.flop import forward_flop
from lark_fast.pool.records import NOT_SCORED
from lark_fast.student import Student
from lark_fast.training.batches import default_tokens, micro_batches
from lark_fast.training.config import TrainConfig
from lark_fast.training.data import TrainingSet
from lark_fast.training.step import Trainer

VOCABULARY, N = (QWEN_VOCABULARY, 64) if DEVICE.type == "cuda" else (8192, 8)


def training_set():
    rng = np.random.default_rng(0)
    prompts, answers = short_answers(N)
    lengths = prompts + answers
    return TrainingSet(
        ids=rng.integers(0, VOCABULARY, lengths.sum()).astype(np.int32),
        scored=np.concatenate([np.arange(p + a) >= p for p, a in zip(prompts, answers, strict=True)]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        lengths=lengths,
        n_scored=answers,
        weights=rng.uniform(0.1, 1.0, N),
        keys=[(str(row), "0") for row in range(N)],
        sources=["generated"] * N,
        lines=np.arange(N),
        dropped=0,
        truncated=0,
    )


class PlainLoop:
    """The same weighted objective as one writes it by hand: Transformers' logits, cross entropy, AdamW."""

    def __init__(self, model, data, config):
        self.model, self.clip = model.train(), config.clip
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
        shares = data.weights / data.n_scored / data.weights.sum()
        self.batches = []
        for rows in micro_batches(np.arange(N), data.lengths, size=None, tokens=default_tokens(DEVICE), packed=False):
            ids, labels, weights = [], [], []
            for row in rows:
                tokens = slice(data.starts[row], data.starts[row + 1])
                ids.append(torch.from_numpy(data.ids[tokens]).long())
                labels.append(ids[-1].masked_fill(~torch.from_numpy(data.scored[tokens]), NOT_SCORED)[1:])
                weights.append(torch.full_like(labels[-1], shares[row], dtype=torch.float32))
            columns = pad_sequence(ids, True), pad_sequence(labels, True, NOT_SCORED), pad_sequence(weights, True)
            self.batches.append([column.to(DEVICE) for column in columns])

    def step(self):
        """(loss, gradient norm), both of before the step."""
        total = 0.0
        self.optimizer.zero_grad()
        for ids, labels, weights in self.batches:
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=NOT_SCORED)
            loss = nll @ weights.flatten()
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return total, norm.item()


def test_training_step(benchmark):
    data = training_set()
    config = TrainConfig(data="", student="", out="", epochs=1, global_batch=N)
    model = student(SMALL, VOCABULARY, torch.float32)
    plain = PlainLoop(copy.deepcopy(model), data, config)
    trainer = Trainer(Student(model), data, config, bfloat16=False)

    def ours():
        measured = trainer.measure(0)
        trainer.update(0)
        return measured

    def check(results):
        loss, norm = results["plain loop"]
        assert results["ours"].loss == pytest.approx(loss, rel=1e-5)
        assert results["ours"].grad_norm == pytest.approx(norm, rel=1e-4)

    product, product_flop = ceiling(torch.float32)
    compare(
        benchmark,
        "training step",
        ours,
        limit=product,
        limit_scale=3 * forward_flop(model, data.lengths.tolist(), int(data.n_scored.sum())) / product_flop,
        peers={"plain loop": plain.step},
        check=check,
        shape=f"{N} trajectories, {data.lengths.sum()} tokens, D={SMALL['hidden_size']} V={VOCABULARY}",
        dtype="float32",
    )
