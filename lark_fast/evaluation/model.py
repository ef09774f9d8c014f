"""The model to evaluate: a whole checkpoint, or an adapter on its base."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lark_fast.errors import UserError
from lark_fast.student import ADAPTER_CONFIG, fingerprint, load_student, load_tokenizer, student_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WORDS = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Where a model's parts are: directories or hub ids."""

    base: str  # the weights, without an adapter
    adapter: str | None
    tokenizer: str

    @property
    def name(self) -> str:
        """What the user gave."""
        return self.adapter or self.base

    def identity(self) -> dict[str, str]:
        """SHA-256 of everything that decides what the model says."""
        identity = fingerprint(self.base)
        if self.adapter is not None:
            identity["adapter"] = fingerprint(self.adapter)["weights"]
        if self.tokenizer != self.base:
            identity["tokenizer"] = fingerprint(self.tokenizer)["tokenizer"]
        return identity


def find_model(path: str, base: str | None = None) -> ModelFiles:
    """Look what is there; nothing is loaded.

    Args:
        path: a directory or hub id; a directory with adapter_config.json is an adapter's (PEFT).
        base: the model the adapter belongs to, instead of the one that it names.

    Raises:
        UserError: no model there, an adapter whose base is not to be found, or a base for a whole model.
    """
    directory = Path(path)
    if not (directory / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise UserError(f"--base {base}: {path} is no adapter, it has no {ADAPTER_CONFIG}")
        student_files(path)
        return ModelFiles(base=path, adapter=None, tokenizer=path)
    named = base or _base_of(directory)
    try:
        student_files(named)
    except UserError as error:
        raise UserError(f"{path}: an adapter of {named}: {error}; say where that is with --base DIR") from error
    has_words = any((directory / name).is_file() for name in _WORDS)
    return ModelFiles(base=named, adapter=path, tokenizer=path if has_words else named)


def _base_of(directory: Path) -> str:
    """The base that an adapter names; a relative path counts from here or from the adapter's own directory."""
    try:
        named = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / ADAPTER_CONFIG}: does not say whose adapter it is; give --base DIR") from error
    if not named:
        raise UserError(f"{directory / ADAPTER_CONFIG}: does not say whose adapter it is; give --base DIR")
    beside = directory / named
    return str(beside) if beside.is_dir() and not Path(named).is_dir() else named


def load_model(
    files: ModelFiles, *, device: str, dtype: str, trust_remote_code: bool
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the model, an adapter merged into its weights in memory.

    Raises:
        UserError: peft is missing, or the adapter does not fit the base.
    """
    student = load_student(files.base, device=device, dtype=dtype, trust_remote_code=trust_remote_code, tokenizer=False)
    model = student.model
    if files.adapter is not None:
        model = _merged(model, files)
    return model, load_tokenizer(files.tokenizer, trust_remote_code)


def _merged(model: "PreTrainedModel", files: ModelFiles) -> "PreTrainedModel":
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"{files.adapter}: an adapter needs peft: pip install 'lark-fast[lora]'") from error
    try:
        return PeftModel.from_pretrained(model, files.adapter).merge_and_unload().eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{files.adapter}: does not go with the base {files.base}: {reason}") from error
