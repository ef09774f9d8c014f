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
    from lark_fast.evaluation.backends.backend import Prompt
    from lark_fast.evaluation.backends.transformers import TransformersBackend
    from lark_fast.evaluation.config import Sampling
    from lark_fast.student import load_student

    loaded = load_student(str(student), dtype="float32")
    tokenizer = loaded.tokenizer
    prompts = []
    for number, problem in enumerate(problems):
        text = tokenizer.apply_chat_template(ask(problem), tokenize=False, add_generation_prompt=True)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        prompts.append(Prompt(key=str(number), ids=ids, thinking=False, max_new_tokens=LONGEST_ANSWER))
    backend = TransformersBackend(loaded.model, tokenizer, [tokenizer.eos_token_id])
    answers = dict(backend.generate(prompts, Sampling(stop_at_answer=False)))
    return np.array([problem.is_solved_by(answers[number][0].text) for number, problem in enumerate(problems)])
