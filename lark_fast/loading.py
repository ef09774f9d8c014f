"""A student's model, loaded: the right class, onto the right devices, and nothing of it left to chance."""

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lark_fast.adapters import with_adapter
from lark_fast.errors import UserError
from lark_fast.student_files import StudentFiles, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # Transformers' names

DeviceMap = str | dict[str, int | str]


def load_model(
    files: StudentFiles,
    place: torch.device,
    dtype: torch.dtype | str,
    *,
    device_map: DeviceMap | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> "PreTrainedModel":
    """The model of a student, an adapter with it, ready to be asked.

    A checkpoint that reads images too is loaded whole, and asked with text alone.

    Args:
        files: where it is.
        place: the device, where ``device_map`` does not say it.
        dtype: of what is not quantised; "auto": the checkpoint's own.
        device_map: see ``read_device_map``.
        trust_remote_code: run model code that the checkpoint brings along.
        quiet: do not tell of tensors that have no place in the model.

    Raises:
        UserError: something is missing, or does not fit.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    files.refuse_torn()
    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every product of 8 bits
    # For weights on disk that the checkpoint has in another form; it goes with the model.
    folder = None if device_map is None else tempfile.TemporaryDirectory(prefix="lark-fast-")
    try:
        with _only_errors():
            config = AutoConfig.from_pretrained(files.base, trust_remote_code=trust_remote_code)
            kind = _auto_class(config)
            model, info = kind.from_pretrained(
                files.base,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which is refused below, with the name
                **_placement(config, place, device_map),
                **({} if folder is None else {"offload_folder": folder.name}),
            )
        model._lark_fast_offload = folder
        _refuse_random(info)
        if getattr(model, "hf_device_map", None) is None and not _is_quantised(config):
            model = model.to(place)
    except UserError as error:
        raise UserError(f"{files.name}: cannot be loaded as a student: {error}") from error
    except Exception as error:  # of a config that is none, of Transformers, of a quantiser: anything at all
        raise UserError(f"{files.name}: cannot be loaded as a student: {one_line(error)}") from error
    strangers = sorted(info["unexpected_keys"])
    if strangers and not quiet:
        words = f"{len(strangers)} tensors of the checkpoint have no place in the model, the first is {strangers[0]}"
        print(f"lark-fast: {files.name}: {words}", file=sys.stderr)
    if files.adapter is not None:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UserError(
                f"{files.name}: an adapter needs its base on devices that compute, and --device-map leaves parts of it "
                "elsewhere; merge the adapter into a checkpoint first"
            )
        with _only_errors():
            model = with_adapter(model, files)
    _keep_head(model)
    return model.eval().requires_grad_(False)


def read_device_map(text: str | None) -> DeviceMap | None:
    """What ``--device-map`` says.

    Args:
        text: one of ``DEVICE_MAPS``, or a JSON file: {module: GPU number, "cuda:1", "cpu" or "disk"}.

    Raises:
        UserError: neither, or accelerate is missing.
    """
    if text is None:
        return None
    if find_spec("accelerate") is None:
        raise UserError(f"--device-map {text}: needs accelerate: pip install 'lark-fast[large]'")
    if text in DEVICE_MAPS:
        return text
    if not Path(text).is_file():
        raise UserError(f"--device-map {text}: is neither one of {', '.join(DEVICE_MAPS)} nor a JSON file")
    try:
        value = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--device-map {text}: cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict) or not value:
        raise UserError(f"--device-map {text}: is not an object of modules and their devices")
    for module, device in value.items():
        if isinstance(device, bool) or not isinstance(device, int | str):
            raise UserError(f"--device-map {text}: {module} is on {device!r}, which is no device")
        if device != "disk":
            refuse_missing_device(torch_device(device, f"--device-map {text}"), f"--device-map {text}")
    return value


def torch_device(name: int | str, option: str) -> torch.device:
    """The device of that name; a number is a GPU's.

    Raises:
        UserError: there is no device of that name.
    """
    try:
        return torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{option}: no device is called {name!r}; names are cpu, cuda, cuda:0, ...") from error


def refuse_missing_device(device: torch.device, option: str) -> None:
    """Look whether tensors can be put there.

    Raises:
        UserError: there is no such device on this machine.
    """
    if device.type == "meta":
        raise UserError(f"{option}: meta holds no numbers")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(f"{option}: no GPU is to be seen here; --device cpu does without")
        if (device.index or 0) >= count:
            raise UserError(f"{option}: there is no {device} here, the last one is cuda:{count - 1}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{option}: {one_line(error)}") from error


def _auto_class(config: "PreTrainedConfig") -> type[Any]:
    """The class that gives this config a language model's head."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{config.model_type} is an encoder and a decoder; a student is a causal language model")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UserError(f"{config.model_type} is an encoder, whose tokens see those behind them; a student is causal")
    kinds = {
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    for kind, known in kinds.items():
        if type(config) in known or kind.__name__ in (getattr(config, "auto_map", None) or ()):
            return kind
    raise UserError(f"Transformers knows no causal language model of type {config.model_type}")


def _placement(config: "PreTrainedConfig", place: torch.device, device_map: DeviceMap | None) -> dict[str, Any]:
    """Where ``from_pretrained`` puts the weights. Without accelerate it knows the host's memory alone."""
    if device_map is not None:
        return {"device_map": device_map}
    # Straight to the GPU, and no detour over as much of the host's memory.
    if _is_quantised(config) or (place.type != "cpu" and find_spec("accelerate") is not None):
        return {"device_map": {"": place}}
    return {}


def _is_quantised(config: "PreTrainedConfig") -> bool:
    return bool(getattr(config, "quantization_config", None))


def _refuse_random(info: dict[str, Any]) -> None:
    """Transformers fills in at random what a checkpoint lacks or has in another shape, and says so in passing."""
    for name, found, wanted in sorted(info["mismatched_keys"]):
        shapes = (" x ".join(map(str, shape)) for shape in (found, wanted))
        raise UserError("{} is {} in the checkpoint, and {} by its config.json".format(name, *shapes))
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of the model's tensors, the first is {missing[0]}; is it of this "
            "config.json, and whole?"
        )


def _keep_head(model: "PreTrainedModel") -> None:
    """The head's weight stays where it is multiplied: it is read by itself, and not by a call that would fetch it."""
    output = model.get_output_embeddings()
    hook = getattr(output, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "offload", False):
            for name, parameter in list(output.named_parameters(recurse=False)):
                if name not in part.weights_map:
                    raise UserError("--device-map: head and embedding share a weight; put both in one place")
                value = part.weights_map[name].to(part.execution_device, parameter.dtype)
                setattr(output, name, nn.Parameter(value, requires_grad=False))
            part.offload = False


@contextmanager
def _only_errors() -> Iterator[None]:
    """What Transformers' tables and PEFT's warnings tell of what they found is said by us, in a line."""
    from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    before, accelerate = get_verbosity(), logging.getLogger("accelerate")
    accelerate_before = accelerate.level
    set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        set_verbosity(before)
        accelerate.setLevel(accelerate_before)
