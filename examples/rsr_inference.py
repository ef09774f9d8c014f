"""The inference loop of the released Rank-Surprisal Ratio code (rsr_cal.py), answered by lark-fast: no [T, V] logits.

``lark-fast rsr-metrics`` takes that program's flags and writes its files. A program built on it needs one line before
``rsr_cal.run(...)``: ``rsr_cal.infer_dataset = infer_dataset``.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lark_fast import Scorer
from lark_fast.dropins.rsr_numbers import infer, tokenise
from lark_fast.pool.objects import read_objects


def infer_dataset(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    json_path: Path,
    batch_size: int,  # not used: sequences of about one length go together, as many as fit a budget of tokens
    max_model_len: int | None = None,
    input_format: str = "messages",
    rank_clip_r: int = 100,
    chat_template: str = "qwen",
    media_root: str = "",
) -> list[dict[str, Any]]:
    """Probability, nll and clipped rank of the assistant's tokens in every sample that has some."""
    if input_format != "messages":
        raise ValueError(f"input_format={input_format!r}: only text, 'messages', is read here")
    samples = ((f"{json_path}:{line}", sample) for line, sample in read_objects(str(json_path), "json_path"))
    sequences = tokenise(samples, tokenizer, chat_template=chat_template, max_model_len=max_model_len)
    return [result for window in infer(Scorer(model), sequences, rank_clip_r=rank_clip_r) for result in window]
