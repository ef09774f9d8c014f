"""Shared by the tests of training: tiny students on disk, weighted rows, and what a run has logged."""

import json
import random
from pathlib import Path

import pytest
import torch

from lark_fast.training import run as training_run
from lark_fast.training.loop import TIMED
from lark_fast.training.run import TrainConfig, train
from tests.command import make_records, write_jsonl
from tests.templates import CHATML
from tests.tiny import byte_level_tokenizer, tiny_llama


def save_student(directory: Path, model=None, *, dtype=torch.float32) -> Path:
    """A checkpoint of a tiny model and its tokenizer."""
    tokenizer = byte_level_tokenizer(CHATML)
    model = tiny_llama(len(tokenizer)) if model is None else model
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def weighted_rows(problems=4, *, seed=0):
    """Conversations of different lengths, with weights far from equal."""
    rng = random.Random(seed)
    return [{**record, "weight": rng.choice([0.02, 0.3, 1.0, 2.5])} for record in make_records(problems)]


def write_data(path: Path, rows) -> Path:
    return write_jsonl(path, rows)


def run(data: Path, student: Path, out: Path, **settings):
    """Train; the defaults are a few steps of unequal batches at a rate that moves, in float32 on every CPU."""
    settings = {"epochs": 2, "lr": 3e-3, "global_batch": 5, "device": "cpu", "dtype": "float32"} | settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "matmul_ceiling", lambda *_: 1e12)  # measuring it takes longer than most of these
        return train(TrainConfig(data=str(data), student=str(student), out=str(out), **settings))


def metrics(out: Path, *, timed=False):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if timed or k not in TIMED} for line in lines]
