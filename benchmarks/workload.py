"""What is scored and trained on: students with random weights, sequences as long as real ones."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.comparison import DEVICE
from lark_fast.flop import ForwardCost
from lark_fast.training.data import TrainingSet

SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
QWEN_HALF_B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
QWEN_1B5 = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN_VOCABULARY = 151936
# As Gemma 3 270M has them: 100 M parameters of layers, 168 M of words.
GEMMA_270M = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
GEMMA_VOCABULARY = 262144


def llama_config(sizes: Mapping[str, Any], vocabulary: int) -> LlamaConfig:
    """Of these sizes."""
    return LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        tie_word_embeddings=sizes["hidden_size"] < 2048,  # as Qwen2.5's are
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        **sizes,
    )


def cost_of(sizes: Mapping[str, Any], vocabulary: int) -> ForwardCost:
    """Of a Llama of these sizes, without making it."""
    with torch.device("meta"):
        return ForwardCost.of(AutoModelForCausalLM.from_config(llama_config(sizes, vocabulary)))


@torch.no_grad()
def student(sizes: Mapping[str, Any], vocabulary: int, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of these sizes whose logits are about as peaked as a real student's."""
    config = llama_config(sizes, vocabulary)
    with DEVICE:  # seven billion parameters made elsewhere would take minutes
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 2.0 / parameter.shape[1] ** 0.5, generator=generator)
    return model.eval()


def short_answers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of n prompts and of their answers, spread as GSM8K's are: medians 105 and 88, and a long tail."""
    rng = np.random.default_rng(0)
    prompts = rng.lognormal(np.log(105), 0.21, n).astype(np.int64)
    return prompts, rng.lognormal(np.log(88), 0.43, n).clip(4, 1500).astype(np.int64)


def long_answers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The same as a pool of long reasoning has it: quarter 1,300, median 2,900, 95 % below 12,000, none over 32,000."""
    rng = np.random.default_rng(1)
    prompts = rng.lognormal(np.log(105), 0.21, n).astype(np.int64)
    # Two halves of a lognormal about the median, since the lower tail is the longer one.
    spread = rng.standard_normal(n)
    answers = 2900 * np.exp(spread * np.where(spread < 0, 1.19, 0.863))
    return prompts, answers.astype(np.int64).clip(16, 32000)


def training_set(n: int, vocabulary: int, long: bool, longest: int) -> TrainingSet:
    """Random words, as many as in real prompts and answers, none longer than ``longest``, and random weights."""
    rng = np.random.default_rng(0)
    prompts, answers = (long_answers if long else short_answers)(n)
    answers = np.minimum(answers, longest - prompts)
    lengths = prompts + answers
    return TrainingSet(
        ids=rng.integers(0, vocabulary, lengths.sum()).astype(np.int32),
        scored=np.concatenate([np.arange(p + a) >= p for p, a in zip(prompts, answers, strict=True)]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        lengths=lengths,
        n_scored=answers,
        weights=rng.uniform(0.1, 1.0, n),
        keys=[(str(row), "0") for row in range(n)],
        sources=["generated"] * n,
        lines=np.arange(n),
        dropped=0,
        truncated=0,
    )


def some(data: TrainingSet, tokens: int) -> TrainingSet:
    """The first trajectories: as many as fit ``tokens``, and two of them at least."""
    n = max(2, int((data.starts[1:] <= tokens).sum()))
    end = data.starts[n]
    return replace(
        data,
        ids=data.ids[:end],
        scored=data.scored[:end],
        starts=data.starts[: n + 1],
        lengths=data.lengths[:n],
        n_scored=data.n_scored[:n],
        weights=data.weights[:n],
        keys=data.keys[:n],
        sources=data.sources[:n],
        lines=data.lines[:n],
    )


def by_tokens(data: TrainingSet) -> TrainingSet:
    """Weights under which the objective is the mean nll of all scored tokens, which is TRL's."""
    return replace(data, weights=data.n_scored.astype(np.float64))
