"""Shared by the tests of the trainers: rows, runs of real trainers, and the objective by hand."""

import random
from dataclasses import dataclass
from itertools import chain

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments
from trl import SFTConfig

from lark_fast.trainers import WeightedSFTTrainer, WeightedTrainer
from tests.tiny import byte_level_tokenizer, tiny_llama

disable_progress_bar()
VOCAB = 400
TOKENIZER = byte_level_tokenizer(vocab_size=VOCAB)
RATE = 0.02  # moves every weight, and is too low for rounding errors to grow from step to step
PACK = 64  # tokens: packs of one to five trajectories
LAYOUTS = {"padded": {}, "padding_free": {"padding_free": True, "max_length": None}, "packed": {"packing": True}}


def token_rows(n=12, *, seed=0, longest=40):
    """Tokenised rows of unequal lengths and weights; a prompt, and sometimes the middle, is not scored."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        ids = [rng.randrange(4, VOCAB) for _ in range(rng.randrange(4, longest))]
        labels = [-100 if place < len(ids) // 3 or rng.random() < 0.2 else token for place, token in enumerate(ids)]
        labels[-1] = ids[-1]
        rows.append({"input_ids": ids, "labels": labels, "weight": rng.choice([0.02, 0.3, 1.0, 2.5])})
    return rows


ROWS = token_rows()
ROWS_OF_RANKS = token_rows(24)  # 8 packs: what two ranks share out evenly


def settings(out, **changes):
    """A rate that moves the weights, batches in the order of the data, nothing else."""
    return {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "num_train_epochs": 1,
    } | changes


def sft(out, rows, *, model=None, layout="padded", kind=WeightedSFTTrainer, eval_rows=None, **changes):
    """A TRL trainer; what is no setting of its config goes to the constructor."""
    own = {name: changes.pop(name) for name in ("loss_norm", "peft_config", "compute_metrics") if name in changes}
    config = SFTConfig(**settings(out, **({"max_length": PACK} | LAYOUTS[layout] | changes)))
    return kind(
        model or tiny_llama(VOCAB),
        config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=TOKENIZER,
        **own,
    )


def hf(out, rows, *, model=None, eval_rows=None, **changes):
    """A Transformers trainer."""
    names = ("loss_norm", "padding_free", "data_collator", "compute_metrics", "compute_loss_func")
    own = {name: changes.pop(name) for name in names if name in changes}
    return WeightedTrainer(
        model or tiny_llama(VOCAB),
        TrainingArguments(**settings(out, **changes)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        **own,
    )


@dataclass
class Curve:
    """The loss of every step and the weights behind the last."""

    losses: list[float]
    parameters: dict[str, torch.Tensor]


def trained(trainer, **arguments):
    """Run it."""
    trainer.train(**arguments)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Curve(losses, {name: p.detach().double() for name, p in trainer.model.named_parameters()})


def trajectories(trainer, rows):
    """For each row of what is trained on, the rows of the data that lie in it."""
    known = {tuple(row["input_ids"]): index for index, row in enumerate(rows)}
    found = []
    for row in trainer.train_dataset:
        ids, places = row["input_ids"], []
        for length in row.get("seq_lengths") or [len(ids)]:
            places.append(known[tuple(ids[:length])])
            ids = ids[length:]
        found.append(places)
    return found


def nlls(model, row):
    """Sum and number of the nll of a row's scored tokens, from its logits, by itself."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    logits = model(input_ids=ids).logits[0]
    return cross_entropy(logits[:-1], labels[1:], reduction="sum"), int((labels[1:] != -100).sum())


def by_hand(model, rows, batches, *, loss_norm="trajectory", lr=RATE):
    """The definition, in float64, a trajectory at a time: ``batches`` are the global batches."""
    model = model.double().train()
    lengths = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    counted = [row["weight"] * (t if loss_norm == "token" else 1) for row, t in zip(rows, lengths, strict=True)]
    mean = sum(counted) / len(rows)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        total = 0.0
        for index in batch:
            nll, n_scored = nlls(model, rows[index])
            part = rows[index]["weight"] * nll / (1 if loss_norm == "token" else n_scored) / (len(batch) * mean)
            part.backward()
            total += part.item()
        optimizer.step()
        losses.append(total)
    return Curve(losses, {name: p.detach() for name, p in model.named_parameters()})


def global_batches(trainer, rows, size):
    """The data's rows of every step, ``size`` rows of the training set at a time."""
    packs = trajectories(trainer, rows)
    return [list(chain.from_iterable(packs[first : first + size])) for first in range(0, len(packs), size)]


def distance(one, other):
    """The largest relative difference of losses, and of parameters in norm."""
    assert len(one.losses) == len(other.losses)
    losses = max(abs(a - b) / abs(b) for a, b in zip(one.losses, other.losses, strict=True))
    parameters = max(float((one.parameters[k] - v).norm() / v.norm()) for k, v in other.parameters.items())
    return max(losses, parameters)
