"""What a training run leaves: a checkpoint any Transformers program can load, and the picture of its loss."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lark_fast.adapters import merged
from lark_fast.loading import load_model
from lark_fast.student_files import StudentFiles
from lark_fast.training.step import Trainer

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
    trainer: Trainer, out: Path, *, dtype: torch.dtype, chat_template: str | None, with_code: bool
) -> None:
    """Write model, or adapter, and tokenizer into ``out``; of several ranks, which all take part, rank 0 does.

    Args:
        trainer: what was trained; its parameters are cast to ``dtype``.
        out: an existing directory.
        dtype: of the weights on disk; an adapter's are as they were trained.
        chat_template: the template trained with in place of the tokenizer's own, or None.
        with_code: copy the student's own Python files too.
    """
    student, adapters = trainer.student, trainer.adapters
    named = student.model.state_dict(keep_vars=True) if adapters is None else trainer.trained
    wholes: dict[int, torch.Tensor | None] = {}  # tensors of two names stay one, and are gathered once by all ranks
    for tensor in named.values():
        if id(tensor) not in wholes:
            whole = _whole(tensor, dtype if adapters is None else tensor.dtype)
            wholes[id(tensor)] = whole if trainer.world.main else None
    if not trainer.world.main:
        return
    weights = {name: wholes[id(tensor)] for name, tensor in named.items()}
    # The tokenizer's files are copied as they are: loading and saving one again may change how it splits.
    copied = [*((student.files.tokenizer, pattern) for pattern in TOKENIZER_FILES), (student.files.base, "*.py")]
    for directory, pattern in copied if with_code else copied[:-1]:
        for file in directory.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
    if chat_template is not None:
        (out / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    if adapters is None:
        student.model.to(dtype).save_pretrained(out, state_dict=weights)  # its config names the model's dtype
        return
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    adapters.save_pretrained(out, state_dict=prefixed, save_embedding_layers=False)
    if trainer.config.lora.merge:
        _merge(student.files, out, dtype, trust_remote_code=with_code)


def _whole(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A parameter, or the parts of it on all ranks, on the CPU."""
    tensor = tensor.detach()
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.to("cpu", dtype if whole.is_floating_point() else whole.dtype)


def _merge(files: StudentFiles, out: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> None:
    """Turn an adapter's directory into a whole model's; merged in float32 and rounded once."""
    from peft import PeftModel

    base = load_model(files, torch.device("cpu"), torch.float32, trust_remote_code=trust_remote_code, quiet=True)
    whole = merged(PeftModel.from_pretrained(base, out))
    for file in out.glob("adapter_*"):
        file.unlink()
    whole.to(dtype).save_pretrained(out)


def checkpoint_dtype(files: StudentFiles, *, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype a student is stored in, float32 where its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(files.base, trust_remote_code=trust_remote_code)
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
