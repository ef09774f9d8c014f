"""What a training run leaves: a checkpoint any Transformers program can load, and the picture of its loss."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lark_fast.student import Student, student_files

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens*",
    "added_tokens*",
    "chat_template*",
    "*.model",
    "*.tiktoken",
)


def write_checkpoint(
    student: Student, out: Path, *, dtype: torch.dtype, chat_template: str | None, with_code: bool
) -> None:
    """Write model and tokenizer into ``out``.

    Args:
        student: the trained one; its parameters are cast to ``dtype`` in place.
        out: an existing directory.
        dtype: of the weights on disk.
        chat_template: the template trained with in place of the tokenizer's own, or None.
        with_code: copy the student's own Python files too.
    """
    directory = student_files(student.path)
    # The tokenizer's files are copied as they are: loading and saving one again may change how it splits.
    for pattern in (*TOKENIZER_FILES, *(["*.py"] if with_code else [])):
        for file in directory.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
    if chat_template is not None:
        (out / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    student.model.to(dtype).save_pretrained(out)


def checkpoint_dtype(path: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype a student is stored in, float32 where its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(student_files(path), trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "dtype", None) or config.dtype or torch.float32


def draw_losses(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw training and held-out loss over the steps into a PNG; without matplotlib, say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"lark-fast: {path.name} needs matplotlib: pip install 'lark-fast[plot]'", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)
