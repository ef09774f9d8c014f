"""TRL's trainer on what ``lark-fast select`` chose: packed, without logits, and every weight counts.

    python examples/trl_weights.py [STUDENT selection/train.jsonl OUT]     # without arguments on own_pool.py's

Rows of ``messages`` and ``weight`` could go to ``WeightedSFTTrainer`` as they are, with TRL's ``assistant_only_loss``.
Here lark-fast renders them, so that the tokens trained on are those that were scored, whatever the chat template.
"""

import sys
from typing import Any

import torch
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
    cpu = not torch.cuda.is_available()
    defaults = {"packing": True, "max_length": 4096, "report_to": "none", "use_cpu": cpu, "bf16": not cpu}
    tokenizer = AutoTokenizer.from_pretrained(student)
    trainer = WeightedSFTTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        SFTConfig(output_dir=out, **defaults | settings),
        train_dataset=render(data, Renderer(tokenizer)),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(out)
    return trainer


def example() -> WeightedSFTTrainer:
    """The same on a student and a selection made here."""
    import own_pool
    import tiny

    settings = {"learning_rate": 1e-2, "num_train_epochs": 4, "per_device_train_batch_size": 4, "logging_steps": 1}
    return train(tiny.student(), str(own_pool.example()), f"{tiny.FOLDER}/trl", max_length=512, **settings)


if __name__ == "__main__":
    trained = train(*sys.argv[1:]) if sys.argv[1:] else example()
    losses = [f"{line['loss']:.3f}" for line in trained.state.log_history if "loss" in line]
    print(f"{trained.args.output_dir}: loss {' '.join(losses)}")
