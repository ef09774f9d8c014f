"""TRL's trainer on what ``lark-fast select`` chose: packed, without logits, and every weight counts.

    python examples/trl_weights.py STUDENT selection/train.jsonl OUT

Rows of ``messages`` and ``weight`` could go to ``WeightedSFTTrainer`` as they are, with TRL's ``assistant_only_loss``.
Here lark-fast renders them, so that the tokens trained on are those that were scored, whatever the chat template.
"""

import sys
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from lark_fast.pool.reading import Pool
from lark_fast.rendering.renderer import Renderer
from lark_fast.trainers import WeightedSFTTrainer


def render(path: str, renderer: Renderer) -> Dataset:
    """Rows of ``input_ids``, ``labels`` and ``weight``."""
    rows = [(renderer(record), record.extra["weight"]) for record in Pool([path]).read()]
    return Dataset.from_list([{"input_ids": r.input_ids, "labels": r.labels, "weight": w} for r, w in rows])


def train(student: str, data: str, out: str, **settings: Any) -> WeightedSFTTrainer:
    """Fine-tune; ``settings`` are those of ``SFTConfig``."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    trainer = WeightedSFTTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        SFTConfig(output_dir=out, **{"packing": True, "max_length": 4096, "report_to": "none"} | settings),
        train_dataset=render(data, Renderer(tokenizer)),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(out)
    return trainer


if __name__ == "__main__":
    train(*sys.argv[1:])
