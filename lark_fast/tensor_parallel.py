"""A student larger than one GPU: its layers and its vocabulary are cut over ranks, which work on every pass together.

Transformers' own plan of a model cuts its layers (``DistributedConfig``), so no model has code here. Of the output
embedding each rank keeps the rows of its words, and token_stats_parallel.py makes the statistics of them: no rank
computes a logit of another's word, and none is gathered.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lark_fast.errors import UserError
from lark_fast.kernels.head import Head
from lark_fast.kernels.token_stats import TokenStats
from lark_fast.kernels.token_stats_parallel import token_stats_vocab_parallel
from lark_fast.student_files import StudentFiles, one_line
from lark_fast.talk import Talk

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

INSTEAD = "--device-map auto spreads it over the GPUs of one process instead"
# Styles of a plan by which a projection's outputs, and so attention's heads, are dealt out.
_DEALT = ("colwise", "packed_colwise")
_KEYS = ("k_proj", "qkv_proj", "query_key_value")


class Ranks:
    """The ranks that a model is spread over, seen from one of them; all of the default process group.

    Args:
        output: the model's output embedding.

    Attributes:
        talk: what they tell each other.
        sizes: how many words of the vocabulary each rank has; they follow one another.

    Raises:
        ValueError: the output embedding is cut otherwise than by words, or a rank would have none.
    """

    def __init__(self, output: nn.Module) -> None:
        self.talk, weight = Talk(), output.weight
        if _is_cut(weight) and not _by_words(weight):
            raise ValueError(f"its head is cut otherwise than by words ({weight.placements}); {INSTEAD}")
        # As DTensor cuts: the last ones have what is left.
        n_words, ranks = len(weight), self.talk.size
        share = math.ceil(n_words / ranks)
        self.sizes = [max(0, min(share, n_words - rank * share)) for rank in range(ranks)]
        if not all(self.sizes):
            raise ValueError(f"{n_words} words are too few for {ranks} ranks")

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "Ranks | None":
        """Those of a model, or None where it is whole.

        Raises:
            ValueError: it is spread over ranks in more ways than this one.
        """
        size = getattr(model, "tp_size", None) or 1
        if size == 1:
            return None
        if size != dist.get_world_size():
            raise ValueError(f"it is spread over {size} of {dist.get_world_size()} ranks; only all of them will do")
        return cls(model.get_output_embeddings())

    @property
    def words(self) -> slice:
        """This rank's words."""
        start = sum(self.sizes[: self.talk.rank])
        return slice(start, start + self.sizes[self.talk.rank])

    def part(self, values: Tensor) -> Tensor:
        """This rank's rows of the output embedding's weight ``[V, D]``, or of its bias ``[V]``."""
        return values.to_local() if _is_cut(values) else on_this_rank(values)[self.words]

    def token_stats(self, hidden: Tensor, head: Head, labels: Tensor, **options: Any) -> TokenStats:
        """``token_stats``, of a head that has this rank's words."""
        return token_stats_vocab_parallel(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            sizes=self.sizes,
            **options,
        )

    def apart(self, hidden: Tensor) -> bool:
        """Whether hidden states ``[T, D]`` differ between ranks by more than rounding: then the plan does not hold."""
        everyone = [torch.empty_like(hidden) for _ in range(self.talk.size)]
        dist.all_gather(everyone, hidden.contiguous())
        first = everyone[0].float()
        return any((other.float() - first).norm() > 1e-2 * first.norm() for other in everyone)


def load_over_ranks(
    files: StudentFiles, place: torch.device, dtype: torch.dtype | str, *, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """This rank's part of a student's model, ready to be asked; called by all ranks of the default process group.

    Args:
        files: where it is.
        place: the device of this rank.
        dtype: of its parameters; "auto": the checkpoint's own.
        trust_remote_code: run model code that the checkpoint brings along.

    Raises:
        UserError: on all ranks: there are none; the student cannot be cut, or it cannot be loaded on one of them.
    """
    if not dist.is_initialized():
        raise UserError(f"{files.name}: a tensor-parallel student takes ranks: start the program with torchrun")
    if files.adapter is not None or files.quantised:
        what = "an adapter" if files.adapter is not None else "a quantised checkpoint"
        raise UserError(f"{files.name}: {what} is not cut over ranks; {INSTEAD}, or merge it into a plain checkpoint")
    from transformers.utils.logging import disable_progress_bar

    files.refuse_torn()
    disable_progress_bar()
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    try:
        model = Talk().done(lambda: _load_in_parts(files.base, place, **options))
    except UserError:
        raise
    except Exception as error:  # of Transformers, of torch.distributed: anything at all
        raise UserError(f"{files.name}: cannot be loaded as a student: {one_line(error)}") from error
    return model.eval().requires_grad_(False)


def _load_in_parts(directory: Path, place: torch.device, **options: Any) -> "PreTrainedModel":
    """This rank's part, or all of it where there is one rank."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    size = dist.get_world_size()
    if size == 1:
        return AutoModelForCausalLM.from_pretrained(directory, **options).to(place)
    accelerator = torch.accelerator.current_accelerator() or torch.device("cpu")
    if place.type != accelerator.type:
        raise UserError(
            f"--device {place.type}: over ranks a student goes to the GPUs that are there; "
            "CUDA_VISIBLE_DEVICES= in front of the command hides them"
        )
    remote = options.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=remote)
    with torch.device("meta"):
        plan = AutoModelForCausalLM.from_config(config, trust_remote_code=remote).tp_plan
    fault = _fault(config.get_text_config(), plan or {}, size)
    if fault:
        raise UserError(f"{directory}: {fault}")
    return AutoModelForCausalLM.from_pretrained(
        directory, distributed_config=DistributedConfig(tp_size=size), **options
    )


def on_this_rank(values: Tensor) -> Tensor:
    """What this rank has of a parameter that may be spread."""
    return values.to_local() if hasattr(values, "to_local") else values


def _fault(config: "PreTrainedConfig", plan: dict[str, str], size: int) -> str | None:
    """Why a model cannot be cut for so many ranks, or None where it can."""
    if not any(".*." in name for name in plan):
        return f"Transformers has no tensor-parallel plan for {config.model_type}; {INSTEAD}"
    dealt = {name.rpartition(".")[2] for name, style in plan.items() if style in _DEALT and "att" in name}
    counts = {"attention heads": config.num_attention_heads} if dealt else {}
    if dealt.intersection(_KEYS):
        counts["key-value heads"] = getattr(config, "num_key_value_heads", None)
    known = {what: number for what, number in counts.items() if isinstance(number, int)}
    if not any(number % size for number in known.values()):
        return None
    common = math.gcd(*known.values())
    fitting = ", ".join(str(ranks) for ranks in range(1, common + 1) if common % ranks == 0)
    told = " and ".join(f"{number} {what}" for what, number in known.items())
    return f"{told} cannot be dealt out to {size} ranks; --nproc-per-node can be {fitting}"


def _is_cut(values: Tensor) -> bool:
    """Whether a parameter is spread, and not whole on every rank."""
    return hasattr(values, "placements") and not all(placement.is_replicate() for placement in values.placements)


def _by_words(weight: Tensor) -> bool:
    return len(weight.placements) == 1 and weight.placements[0].is_shard(0)
