"""What is scored and trained on: students with random weights, sequences as long as real ones, and the FLOP of both."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.comparison import DEVICE
from tests.tiny import tiny_llama

SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
QWEN_HALF_B = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN_VOCABULARY = 151936


def student(sizes: Mapping[str, Any], vocabulary: int, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of these sizes whose logits are about as peaked as a real student's."""
    model = tiny_llama(
        vocabulary, **sizes, max_position_embeddings=4096, tie_word_embeddings=True, attn_implementation="sdpa"
    )
    return model.to(DEVICE, dtype)


def short_answers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of n prompts and of their answers, spread as GSM8K's are: medians 105 and 88, and a long tail."""
    rng = np.random.default_rng(0)
    prompts = rng.lognormal(np.log(105), 0.21, n).astype(np.int64)
    return prompts, rng.lognormal(np.log(88), 0.43, n).clip(4, 1500).astype(np.int64)


def forward_flop(model: nn.Module, lengths: Sequence[int], n_scored: int) -> float:
    """FLOP that a forward pass cannot do without: causal attention, no padding, the head on scored rows only.

        body        2 x parameters of the layers' matrices, a token
        attention   2 x 2 x heads x head_dim x tokens seen, a token and layer (scores and values);
                    a sequence of length L sees L (L + 1) / 2
        head        2 x D x V, a scored token

    Args:
        model: a Transformers model of the Llama kind.
        lengths: tokens of every sequence.
        n_scored: tokens that reach the head, of all sequences together.
    """
    config = model.config
    matrices = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.ndim == 2)
    seen = sum(length * (length + 1) / 2 for length in lengths)
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * seen
    return 2 * matrices * sum(lengths) + attention + 2 * config.hidden_size * config.vocab_size * n_scored
