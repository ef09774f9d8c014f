"""A whole scoring pass as it is benchmarked: students, trajectories as long as real ones, peers and limit.

The limit is the pass's own FLOP (``lark_fast.flop``) at the speed of a large square matrix product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from benchmarks.comparison import DEVICE, Workload, ceiling
from benchmarks.eager import eager_topk
from benchmarks.workload import QWEN_7B, QWEN_HALF_B, QWEN_VOCABULARY, SMALL, long_answers, short_answers, student
from lark_fast import Scorer
from lark_fast.flop import forward_flop
from lark_fast.pool.records import NOT_SCORED
from lark_fast.rendering.renderer import Rendered

NAME = "scoring pass, top-k 50"
TOP_K = 50
PADDED_BATCH = 8
PADDED_TOKENS = 32768  # of a padded batch, or one record: more logits than that no GPU holds
CUDA = DEVICE.type == "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A student and what it scores."""

    sizes: dict[str, int]
    vocabulary: int
    records: int
    long: bool  # as the long reasoning pool, otherwise as GSM8K's answers
    dtype: torch.dtype

    def __str__(self) -> str:
        lengths = "long" if self.long else "short"
        return f"{self.sizes['hidden_size']}-{self.vocabulary}-{lengths}-{str(self.dtype).removeprefix('torch.')}"

    def build(self) -> Workload:
        """Made when its turn comes."""
        return scoring_pass(self)


if CUDA:
    PASSES = [
        Pass(sizes=QWEN_HALF_B, vocabulary=QWEN_VOCABULARY, records=1024, long=False, dtype=torch.bfloat16),
        Pass(sizes=QWEN_HALF_B, vocabulary=QWEN_VOCABULARY, records=96, long=True, dtype=torch.bfloat16),
        Pass(sizes=QWEN_7B, vocabulary=152064, records=256, long=False, dtype=torch.bfloat16),
        Pass(sizes=QWEN_7B, vocabulary=152064, records=24, long=True, dtype=torch.bfloat16),
    ]
else:
    PASSES = [
        Pass(sizes=SMALL, vocabulary=8192, records=24, long=False, dtype=torch.float32),
        Pass(sizes=SMALL, vocabulary=8192, records=24, long=False, dtype=torch.bfloat16),
        Pass(sizes=SMALL, vocabulary=QWEN_VOCABULARY, records=6, long=False, dtype=torch.float32),
        Pass(sizes=SMALL, vocabulary=8192, records=2, long=True, dtype=torch.float32),
    ]
TINY = Pass(sizes=SMALL | {"num_hidden_layers": 1}, vocabulary=300, records=3, long=False, dtype=torch.float32)


def scoring_pass(case: Pass) -> Workload:
    """``Scorer.score_rendered`` over records in memory."""
    model = student(case.sizes, case.vocabulary, case.dtype)
    rendered = records(case.records, case.vocabulary, case.long)
    lengths = [len(item.input_ids) for item in rendered]
    scorers = {name: Scorer(model, top_k=TOP_K, compile=name == "compiled") for name in ("auto", "compiled")}
    product, product_flop = ceiling(case.dtype)
    n_scored = sum(item.n_scored for item in rendered)
    exact = one_at_a_time(model, rendered[:2])
    # Eager logits of a bfloat16 model are rounded to it, ours are not.
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-2
    shape = f"{len(lengths)} records, {sum(lengths)} tokens, D={model.config.hidden_size} V={case.vocabulary}"
    return Workload(
        name=NAME,
        shape=shape,
        dtype=case.dtype,
        ours=lambda impl: scorers[impl].score_rendered(rendered),
        implementations=("auto", "compiled"),
        limit=product,
        limit_scale=forward_flop(model, lengths, n_scored) / product_flop,
        peers={
            "one record at a time": partial(one_at_a_time, model, rendered),
            "padded batches": partial(padded_batches, model, rendered),
        },
        check=lambda scores: np.testing.assert_allclose(
            [(score.nll, score.brier_topk) for score in scores[:2]], exact, rtol=tolerance
        ),
    )


def records(n: int, vocabulary: int, long: bool = False) -> list[Rendered]:
    """Random words, as many as in real prompts and answers."""
    rng = np.random.default_rng(0)
    lengths = zip(*(long_answers if long else short_answers)(n), strict=True)
    return [record(rng.integers(0, vocabulary, prompt + answer).tolist(), prompt) for prompt, answer in lengths]


def record(ids: list[int], n_prompt: int) -> Rendered:
    """A trajectory whose prompt is not scored."""
    return Rendered(input_ids=ids, labels=[NOT_SCORED] * n_prompt + ids[n_prompt:], truncated=False)


def eager_score(logits: Tensor, item: Rendered) -> list[float]:
    """(mean nll, mean top-k Brier) of a record from its logits [T, V]."""
    end = len(item.input_ids)
    start = end - item.n_scored
    labels = torch.tensor(item.input_ids[start:], device=DEVICE)
    return [mean.mean().item() for mean in eager_topk(logits[start - 1 : end - 1], labels, TOP_K)]


@torch.no_grad()
def one_at_a_time(model: PreTrainedModel, rendered: Sequence[Rendered]) -> list[Any]:
    """A forward pass a record, with all its logits, as the released code takes it."""
    scores = []
    for item in rendered:
        logits = model(input_ids=torch.tensor([item.input_ids], device=DEVICE)).logits
        scores.append(eager_score(logits[0], item))
    return scores


@torch.no_grad()
def padded_batches(model: PreTrainedModel, rendered: Sequence[Rendered]) -> list[Any]:
    """Batches in the order of the records, padded under an attention mask."""
    scores = []
    for batch in _padded(rendered):
        sequences = [torch.tensor(item.input_ids) for item in batch]
        ids = pad_sequence(sequences, batch_first=True).to(DEVICE)
        mask = pad_sequence([torch.ones_like(row) for row in sequences], batch_first=True).to(DEVICE)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        scores += [eager_score(row, item) for row, item in zip(logits, batch, strict=True)]
    return scores


def _padded(rendered: Sequence[Rendered]) -> Iterator[list[Rendered]]:
    batch: list[Rendered] = []
    for item in rendered:
        longest = max(len(each.input_ids) for each in [*batch, item])
        if batch and (len(batch) == PADDED_BATCH or (len(batch) + 1) * longest > PADDED_TOKENS):
            yield batch
            batch = []
        batch.append(item)
    yield batch
