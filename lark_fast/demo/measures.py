"""What the demo measures of a student: its loss on a selection, and which problems it solves."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lark_fast.demo.problems import Problem
from lark_fast.demo.teachers import ask

if TYPE_CHECKING:
    from lark_fast import Scorer

LONGEST_ANSWER = 200  # tokens; the wordiest teacher stays below


def selection_loss(scorer: "Scorer", selection: Path) -> float:
    """sum_i w_i nll_i / sum_i w_i over the rows of a selection's train.jsonl: what training on it minimises.

    Args:
        scorer: of the student to measure.
        selection: a directory that ``lark-fast select`` wrote.

    Returns:
        Nats a token.
    """
    lines = (selection / "train.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    nll = [score.nll for score in scorer.score(records)]
    return float(np.average(nll, weights=[record["weight"] for record in records]))


def solved(student: Path, problems: Sequence[Problem]) -> NDArray[np.bool_]:
    """Ask a student every problem at once; it answers greedily.

    Args:
        student: a checkpoint.
        problems: P of them.

    Returns:
        ``[P]``: whether the answer's number is exactly right.
    """
    import torch

    from lark_fast.student import load_student

    loaded = load_student(str(student), dtype="float32")
    tokenizer = loaded.tokenizer
    tokenizer.padding_side = "left"  # so that all answers begin in the same place
    prompts = [
        tokenizer.apply_chat_template(ask(problem), tokenize=False, add_generation_prompt=True) for problem in problems
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(loaded.device)
    with torch.no_grad():
        made = loaded.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = tokenizer.batch_decode(made[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return np.array([problem.is_solved_by(text) for problem, text in zip(problems, texts, strict=True)])
