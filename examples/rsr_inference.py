"""The inference loop of the released Rank-Surprisal Ratio code (rsr_cal.py), answered by lark-fast: no [T, V] logits.

A program that runs it needs one line before ``rsr_cal.run(...)``: ``rsr_cal.infer_dataset = infer_dataset``. With a
float32 student the numbers are the same; with a bfloat16 one the original reads logits that were rounded to bfloat16.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lark_fast import Scorer

MARKERS = {  # what opens and closes an assistant's turn
    "qwen": ("<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
}


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
    header, end = (tokenizer(marker, add_special_tokens=False)["input_ids"] for marker in MARKERS[chat_template])
    cut = {"truncation": True, "max_length": max_model_len} if max_model_len else {}
    names, sequences, labels = [], [], []
    for index, sample in enumerate(samples(json_path)):
        if "messages" in sample:
            ids = tokenizer.apply_chat_template(sample["messages"], tokenize=True, return_dict=True, **cut)["input_ids"]
            names.append(sample.get("id", sample.get("_id", index)))
            sequences.append(ids)
            labels.append(assistant_labels(ids, header, end))
    scored = Scorer(model).score_tokens(sequences, labels) if sequences else []
    return [
        {
            "sample_id": name,
            "resp_token_positions": [position for position, label in enumerate(row) if label != -100],
            "probs": stats.nll.neg().exp().tolist(),
            "nlls": stats.nll.tolist(),
            "ranks": stats.rank.clamp(max=rank_clip_r).tolist(),
            "metadata": {},
        }
        for name, row, stats in zip(names, labels, scored, strict=True)
        if len(stats.nll)
    ]


def assistant_labels(ids: list[int], header: list[int], end: list[int]) -> list[int]:
    """The ids behind each header, up to the end marker or, where that was cut off, to the last; -100 elsewhere."""

    def find(marker: list[int], start: int) -> int:
        places = range(start, len(ids) - len(marker) + 1)
        return next((place for place in places if ids[place : place + len(marker)] == marker), len(ids))

    labels, stop = [-100] * len(ids), 0
    while (start := find(header, stop) + len(header)) < len(ids):
        stop = find(end, start)
        labels[start:stop] = ids[start:stop]
    return labels


def samples(path: Path) -> list[dict[str, Any]]:
    """What a JSON list or JSON lines hold."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()] if path.suffix == ".jsonl" else json.load(file)
