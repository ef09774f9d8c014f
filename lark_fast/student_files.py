"""Where a student's parts are: a whole checkpoint, or an adapter on its base. Nothing is loaded here."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lark_fast.errors import UserError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"  # Transformers'
MAY_HOLD_A_STUDENT = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
_WORDS = ("tokenizer.json", "tokenizer_config.json")
_CONVERT = "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) of Transformers writes safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentFiles:
    """The directories that a student is loaded from."""

    name: str  # what the user gave: a directory or hub id
    base: Path  # the weights, without an adapter
    adapter: Path | None
    tokenizer: Path

    @property
    def directories(self) -> tuple[Path, ...]:
        """All that is read."""
        return tuple(dict.fromkeys(path for path in (self.base, self.adapter, self.tokenizer) if path is not None))

    @property
    def quantised(self) -> bool:
        """Whether the weights of the base are stored in fewer bits than they are computed with."""
        return bool(_read_json(self.base / CONFIG).get("quantization_config"))

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of everything that decides what the student says.

        By part: "weights" (with their config and code), "tokenizer" and, where there is one, "adapter".
        """
        prints = {"weights": _digest(_weight_files(self.base)), "tokenizer": _digest(_tokenizer_files(self.tokenizer))}
        if self.adapter is not None:
            prints["adapter"] = _digest(_weight_files(self.adapter))
        return prints

    def refuse_torn(self) -> None:
        """Look whether all files of weights are there and whole, by their headers.

        Raises:
            UserError: naming the first that is not.
        """
        shards = _shards(self.base, self.name)
        for file in [*shards, *([] if self.adapter is None else [_adapter_weights(self.adapter, self.name)])]:
            _refuse_torn(file, self.name)


def find_student(path: str | Path, base: str | None = None) -> StudentFiles:
    """Look where everything is; a hub id is looked up in the cache or fetched.

    Args:
        path: a directory or hub id, ``org/name`` or ``org/name@revision``; one with adapter_config.json is an adapter's
            (PEFT).
        base: the model the adapter belongs to, instead of the one that it names.

    Raises:
        UserError: no student there, an adapter whose base is not to be found, or a base for a whole model.
    """
    name = str(path)
    directory = _directory(name)
    if not (directory / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise UserError(f"--base {base}: {name} is no adapter, it has no {ADAPTER_CONFIG}")
        if not (directory / CONFIG).is_file():
            raise UserError(f"{name}: no {CONFIG} there; a student is a Transformers checkpoint, or an adapter of PEFT")
        return StudentFiles(name=name, base=directory, adapter=None, tokenizer=directory)
    named = base or _base_of(directory)
    try:
        base_directory = _directory(named)
        if (base_directory / ADAPTER_CONFIG).is_file():
            raise UserError("that is an adapter itself, to be merged into its own base first")
        if not (base_directory / CONFIG).is_file():
            raise UserError(f"no {CONFIG} there")
    except UserError as error:
        raise UserError(f"{name}: an adapter of {named}: {error}; say where that is with --base DIR") from error
    has_words = any((directory / file).is_file() for file in _WORDS)
    return StudentFiles(
        name=name, base=base_directory, adapter=directory, tokenizer=directory if has_words else base_directory
    )


def is_adapter(path: str | Path) -> bool:
    """Whether a directory or hub id holds an adapter; see ``find_student``."""
    return (_directory(str(path)) / ADAPTER_CONFIG).is_file()


def found(student: "str | Path | StudentFiles") -> StudentFiles:
    """What was looked up already, or is now."""
    return student if isinstance(student, StudentFiles) else find_student(student)


def whole_path(place: str | os.PathLike[str]) -> str:
    """What names the same directory from any working directory; a hub id as it is."""
    return str(Path(place).resolve() if Path(place).is_dir() else place)


def one_line(error: BaseException) -> str:
    """What an exception of some other package says, fit for a message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _directory(path: str) -> Path:
    """The local directory of a checkpoint or an adapter."""
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") > 1 or path.startswith((".", "~", "/")):
        raise UserError(f"{path}: no such directory")
    return _snapshot(path)


@lru_cache
def _snapshot(path: str) -> Path:
    """The directory of a hub id; once in a process, so that a branch that moves is not two students."""
    from huggingface_hub import snapshot_download

    name, _, revision = path.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=MAY_HOLD_A_STUDENT))
    except Exception as error:  # huggingface_hub and its transport raise many kinds
        raise UserError(
            f"{path}: no such directory, and it cannot be had from the Hugging Face hub ({one_line(error)})"
        ) from error


def _base_of(directory: Path) -> str:
    """The base that an adapter names; a relative path counts from here or from the adapter's own directory."""
    try:
        named = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / ADAPTER_CONFIG}: does not say whose adapter it is; give --base DIR") from error
    if not named or not isinstance(named, str):
        raise UserError(f"{directory / ADAPTER_CONFIG}: does not say whose adapter it is; give --base DIR")
    beside = directory / named
    return str(beside) if beside.is_dir() and not Path(named).is_dir() else named


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: is not a JSON object")
    return value


def _shards(directory: Path, name: str) -> list[Path]:
    """The files of a whole checkpoint's weights that Transformers will look for."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        named = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise UserError(f"{directory / INDEX}: names no shards")
        shards = sorted(set(map(str, named.values())))
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if missing:
            raise UserError(
                f"{name}: cannot be loaded as a student: {missing[0]} is missing, one of the {len(shards)} shards that "
                f"{INDEX} names ({len(missing)} are missing); fetch the checkpoint again"
            )
        return [directory / shard for shard in shards]
    others = sorted(directory.glob("*.safetensors"))
    if others:  # under a name of its config's own
        return others
    raise UserError(f"{name}: cannot be loaded as a student: {_without_safetensors(directory, WEIGHTS)}")


def _adapter_weights(directory: Path, name: str) -> Path:
    if (directory / ADAPTER_WEIGHTS).is_file():
        return directory / ADAPTER_WEIGHTS
    raise UserError(f"{name}: its adapter cannot be loaded: {_without_safetensors(directory, ADAPTER_WEIGHTS)}")


def _without_safetensors(directory: Path, wanted: str) -> str:
    pickled = sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")])
    if not pickled:
        return f"there is no {wanted}"
    return (
        f"its weights are in {pickled[0].name}, which can run code, and lark-fast reads safetensors alone; {_CONVERT}"
    )


def _refuse_torn(file: Path, name: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):  # checks the header, and that the file is as long as it says
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{name}: cannot be loaded as a student: {file.name} is cut short or damaged ({one_line(error)}); fetch it "
            "again"
        ) from error


def _weight_files(directory: Path) -> list[Path]:
    patterns = (CONFIG, "*.safetensors", "adapter_*", "*.py")
    return sorted({file for pattern in patterns for file in directory.glob(pattern)})


def _tokenizer_files(directory: Path) -> list[Path]:
    return sorted(
        file
        for file in directory.iterdir()
        if file.is_file()
        and (
            file.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "added_tokens"))
            or file.suffix in (".model", ".tiktoken")
        )
    )


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            total.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
