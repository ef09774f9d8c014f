"""What is scored and trained on: students with random weights, sequences as long as real ones, and the FLOP of both."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.comparison import DEVICE
from lark_fast.flop import forward_flop as forward_flop  # the benchmarks take a workload and its FLOP from here
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
