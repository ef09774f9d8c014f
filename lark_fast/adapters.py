"""An adapter (PEFT) on its base: merged into the weights in memory, or beside weights that are quantised."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lark_fast.errors import UserError
from lark_fast.student_files import ADAPTER_CONFIG, StudentFiles, one_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def with_adapter(model: "PreTrainedModel", files: StudentFiles) -> "PreTrainedModel":
    """The model with the adapter of ``files``.

    Merged, it has the bits of a merged checkpoint, where the base is stored in the dtype it runs in. Quantised weights
    would be rounded anew by a merge, so there the adapter stays beside them.

    Raises:
        UserError: peft is missing, the adapter does not fit the base, or it is of a kind that cannot be merged.
    """
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise UserError(f"{files.name}: an adapter needs peft: pip install 'lark-fast[lora]'") from error
    kind = _kind(files.adapter)
    tied = _tied(model)
    try:
        config = PeftConfig.from_pretrained(str(files.adapter))
        if config.is_prompt_learning:
            raise UserError(
                f"{files.name}: an adapter of kind {kind} puts tokens of its own before every text, and no score knows "
                "of them; LoRA and other adapters of weights can be scored"
            )
        adapted = get_peft_model(model, config)
        loaded = adapted.load_adapter(str(files.adapter), "default", torch_device="cpu")
    except UserError:
        raise
    except Exception as error:  # peft raises many kinds where shapes or names do not fit
        raise UserError(f"{files.name}: does not go with the base {files.base}: {one_line(error)}") from error
    strangers = [*loaded.missing_keys, *loaded.unexpected_keys]
    if strangers:  # peft goes on with what it has
        raise UserError(
            f"{files.name}: does not go with the base {files.base}: {len(loaded.missing_keys)} tensors of the adapter "
            f"are missing and {len(loaded.unexpected_keys)} have no place in the base, the first is {strangers[0]}"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        return adapted.eval().get_base_model()
    if tied:
        _untie(model)
    try:
        return merged(adapted)
    except Exception as error:
        raise UserError(f"{files.name}: an adapter of kind {kind} that cannot be merged: {one_line(error)}") from error


@torch.no_grad()
def merged(adapted: "PeftModel") -> "PreTrainedModel":
    """The model with its adapter in the weights: added in float32 and rounded once, to the dtype that they have."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            dtype = next(base.parameters()).dtype
            base.to(torch.promote_types(dtype, torch.float32))
            layer.merge()
            base.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are merged already
        return adapted.merge_and_unload().eval()


def _kind(directory: Path) -> str:
    try:
        return str(json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / ADAPTER_CONFIG}: does not say what kind of adapter it is") from error


def _tied(model: "PreTrainedModel") -> bool:
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return output is not None and output.weight is embedding.weight


def _untie(model: "PreTrainedModel") -> None:
    """Give the head a weight of its own where an adapter sits on one of two that are tied: it is not for the other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not any(isinstance(layer, BaseTunerLayer) for layer in (output, embedding)):
        return
    own = output.get_base_layer() if isinstance(output, BaseTunerLayer) else output
    own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
