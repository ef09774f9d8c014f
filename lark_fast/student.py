"""The student: a Transformers causal language model, its tokenizer, and its output head taken apart."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lark_fast.attention import Pack, UnknownAttentionError, attention_in_packs, can_be_packed
from lark_fast.errors import UserError
from lark_fast.kernels.head import Head
from lark_fast.kernels.token_stats import TokenStats, token_stats
from lark_fast.loading import load_model, read_device_map, refuse_missing_device, torch_device
from lark_fast.past import PackedPast, Past, with_pasts
from lark_fast.student_files import StudentFiles, find_student, found, one_line
from lark_fast.talk import lost_ranks
from lark_fast.tensor_parallel import Ranks, load_over_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE_TOKENS = 4
PROBE_LENGTHS = (7, 12, 1, 5)
WHOLE_PROBE = [(0, length) for length in PROBE_LENGTHS]

T = TypeVar("T")


class Student:
    """A causal language model as the scorer and the trainer see it: hidden states and a head.

    Works with any Transformers model that has an output embedding, also one that is spread over ranks
    (``tensor_parallel.py``): then all of them make the same calls. What happens to its logits afterwards (Gemma-2's
    softcap, Cohere's and Granite's scales) is read from the config and checked once against the model's own logits.

    Args:
        model: the model.
        tokenizer: its tokenizer, where text is to be read.
        files: where it was loaded from.

    Raises:
        ValueError: the model has no output embedding, treats its logits in a way this package does not know, or lets
            tokens see those behind them.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        files: StudentFiles | None = None,
    ) -> None:
        self.model, self.tokenizer, self.files = model, tokenizer, files
        self._output = model.get_output_embeddings()
        if self._output is None or getattr(self._output, "weight", None) is None:
            raise ValueError(f"{type(model).__name__} has no output embedding: it is not a causal language model")
        self._config = model.config.get_text_config()
        self._unpacked = None
        if self.quantised and not _is_plain(self._output.weight):
            refuse_adapted_head(self._output)
            self._unpacked = _unpacked(self._output, self._config.hidden_size, model.dtype)
        self.ranks = Ranks.of(model)
        fault = self._found(self._head_fault)
        if fault is not None:
            raise ValueError(fault)

    @property
    def path(self) -> str:
        """The directory or hub id that it was loaded from; "" of a model in memory."""
        return "" if self.files is None else self.files.name

    @property
    def device(self) -> torch.device:
        """Where the model's input goes."""
        embedding = self.model.get_input_embeddings()
        if embedding.weight.is_meta and hasattr(embedding, "_hf_hook"):  # it is fetched for each pass
            return torch.device(embedding._hf_hook.execution_device)
        return embedding.weight.device

    @property
    def head_device(self) -> torch.device:
        """Where hidden states meet the head: another device than ``device`` where a device map says so."""
        return self.head.weight.device

    @property
    def devices(self) -> set[torch.device]:
        """All devices that take part in a pass."""
        named = getattr(self.model, "hf_device_map", None) or {}
        computing = {torch_device(name, "device_map") for name in named.values() if name not in ("cpu", "disk")}
        return computing | {self.device, self.head_device}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states, and of the parameters but for quantised ones."""
        return self.head.weight.dtype

    @property
    def quantised(self) -> bool:
        """Whether Transformers has loaded it by way of a quantiser."""
        return getattr(self.model, "hf_quantizer", None) is not None

    @property
    def vocab_size(self) -> int:
        """Token ids the model can read: rows of the input embedding (often padded beyond the tokenizer's)."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model was built for, or None where the config does not say."""
        return getattr(self._config, "max_position_embeddings", None)

    @property
    def head(self) -> Head:
        """The head's live parameters; of a model that is spread over ranks, this rank's words of it."""
        config = self._config
        scale = getattr(config, "logit_scale", None)
        if scale is None and getattr(config, "logits_scaling", None):
            scale = 1.0 / config.logits_scaling
        if scale is None:
            scale = getattr(config, "lm_head_multiplier", None)
        softcap = getattr(config, "final_logit_softcapping", None)
        weight = self._output.weight if self._unpacked is None else self._unpacked
        bias = getattr(self._output, "bias", None)
        if self.ranks is not None:
            weight, bias = self.ranks.part(weight), None if bias is None else self.ranks.part(bias)
        return Head(weight, bias, softcap, scale)

    def token_stats(self, hidden: Tensor, labels: Tensor, **options: Any) -> TokenStats:
        """``lark_fast.kernels.token_stats`` by the head; ``options`` are what that takes besides."""
        head = self.head
        if self.ranks is not None:
            return self.ranks.token_stats(hidden, head, labels, **options)
        of_head = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
        return token_stats(hidden, head.weight, labels, **of_head, **options)

    def hidden(
        self,
        input_ids: Tensor,
        pack: Pack | None = None,
        position_ids: Tensor | None = None,
        past: PackedPast | None = None,
    ) -> Tensor:
        """The output embedding's input, without computing a logit.

        Args:
            input_ids: ``[B, T]``. Rows of several lengths are padded on the RIGHT with any id: attention is causal, so
                no real token sees the padding and no mask is needed.
            pack: where the sequences lie in the one row of ``input_ids`` ``[1, T]``; only inside ``packing()``.
            position_ids: ``[1, T]``, of a pack: each token's place in its sequence.
            past: of a pack: what its sequences go on from, where the model ``continues``.

        Returns:
            ``[B, T, D]`` in the model's dtype, on ``head_device``. Autograd works through it.
        """
        arguments = {} if pack is None else {"position_ids": position_ids, "pack": pack}
        cache = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
        with stop_before_head(self._output) as captured:
            self.model(input_ids=input_ids, **cache, **arguments)
        return captured[0].to(self.head_device)

    def packing(self) -> AbstractContextManager[None]:
        """Inside the block the model attends within the sequences of a pack, and ``hidden`` takes packs alone."""
        return attention_in_packs(self.model)

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Inside the block the model's layers run through ``torch.compile``; attention does not, and stays as it is."""
        before = {layer: layer._compiled_call_impl for layer in self._compiled_layers}
        for layer, run in self._compiled_layers.items():
            layer._compiled_call_impl = run  # what ``layer.compile()`` sets
        try:
            yield
        finally:
            for layer, own in before.items():
                layer._compiled_call_impl = own

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The model's blocks, as Transformers names the classes that are not to be split.

        Found once: sharding gives their classes other names.
        """
        kinds = set(self.model._no_split_modules or ())
        return [module for module in self.model.modules() if type(module).__name__ in kinds]

    @cached_property
    def _compiled_layers(self) -> dict[nn.Module, Callable[..., Any]]:
        return {layer: torch.compile(layer._call_impl) for layer in self.layers}

    @cached_property
    def unpackable(self) -> str | None:
        """Why sequences cannot share a row of this model, or None where they can.

        Found by trial: a few short sequences in one pack and each by itself. So whatever carries something from token
        to token past the attention function (a state, a convolution) is seen, whoever wrote the model.
        """
        if not can_be_packed(self.model):
            return "its layers mix tokens in ways that packs are not known to keep"
        return self._found(self._packing_fault)

    @property
    def continues(self) -> bool:
        """Whether a sequence may pass through in pieces, of which each sees those before it; found by trial."""
        return self.past_bytes is not None

    @cached_property
    def past_bytes(self) -> float | None:
        """What a token leaves behind for those after it; None where no sequence may pass through in pieces."""
        whole = self.unpackable is None and self.length_regime is None and self.ranks is None
        return self._found(self._left_behind) if whole else None

    def _found(self, look: Callable[[], T]) -> T:
        """What is found with the model in evaluation mode; over ranks, what the first of them finds."""
        was_training = self.model.training
        self.model.eval()
        try:
            with lost_ranks():
                fault = look()
            return fault if self.ranks is None else self.ranks.talk.first(fault)
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def _packing_fault(self) -> str | None:
        ids, pack, places = self._probe(WHOLE_PROBE)
        alone = torch.cat([self.hidden(row)[0] for row in ids.split(PROBE_LENGTHS, dim=1)])
        if not alone.isfinite().all():
            return "its hidden states are not finite"
        try:
            with self.packing():
                together = self.hidden(ids, pack, places)[0]
        except UnknownAttentionError as error:
            return str(error)
        except Exception as error:  # of a model that takes no such arguments, or a kernel that does not run here
            return f"packs fail with it ({type(error).__name__}: {one_line(error)})"
        return None if self._alike(together, alone) else "its tokens see those of other sequences"

    @torch.no_grad()
    def _left_behind(self) -> float | None:
        pasts = [Past() for _ in PROBE_LENGTHS]
        halves = [(0, length // 2) for _, length in WHOLE_PROBE], [(length // 2, length) for _, length in WHOLE_PROBE]
        parts = []
        try:
            with self.packing():
                ids, pack, places = self._probe(WHOLE_PROBE)
                whole = self.hidden(ids, pack, places)[0]
                for half in halves:
                    ids, pack, places = self._probe(half)
                    pack = with_pasts(pack, pasts)
                    past = PackedPast(pasts, pack)
                    made = self.hidden(ids, pack, places, past)[0]
                    past.commit()
                    parts.append(made.split([end - start for start, end in half]))
        except Exception:  # of a model that takes no such cache, or a kernel that does not run here
            return None
        together = torch.cat([part for pair in zip(*parts, strict=True) for part in pair])
        if not self._alike(together, whole):
            return None
        return sum(past.n_bytes for past in pasts) / sum(past.length for past in pasts)

    def _probe(self, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Pack, Tensor]:
        """Token ids, pack and places of some sequences, of each the tokens from one place to another."""
        pack = Pack.of([end - start for start, end in spans], self.device)
        places = torch.cat([torch.arange(*span, device=self.device) for span in spans])
        firsts = np.cumsum([0, *PROBE_LENGTHS])
        ids = torch.cat(
            [
                1 + 7 * (first + torch.arange(*span, device=self.device))
                for first, span in zip(firsts, spans, strict=False)
            ]
        )
        return ids.remainder(self.vocab_size).unsqueeze(0), pack, places.unsqueeze(0)

    def _alike(self, ours: Tensor, theirs: Tensor) -> bool:
        """Whether hidden states ``[T, D]`` are the same but for rounding."""
        distance = (ours - theirs).float().norm(dim=1) / theirs.float().norm(dim=1)
        # Activations that are quantised too jump by a whole step where they differ in the last bit.
        allowed = 1e-1 if self.quantised or self.dtype in (torch.bfloat16, torch.float16) else 1e-3
        return bool((distance <= allowed).all())

    @property
    def length_regime(self) -> int | None:
        """The length beyond which a whole batch's positions are scaled otherwise (LongRoPE, dynamic RoPE)."""
        rope = getattr(self._config, "rope_parameters", None) or {}
        parts = [rope, *(value for value in rope.values() if isinstance(value, dict))]
        kinds = {part.get("rope_type"): part for part in parts}
        if "longrope" in kinds:
            return kinds["longrope"].get("original_max_position_embeddings")
        return self.max_positions if "dynamic" in kinds else None

    @torch.no_grad()
    def _head_fault(self) -> str | None:
        """Our head against the model's own logits, on a few tokens: never score with a head that is not the model's.

        And the same tokens with another one behind them: nothing that is scored may have been seen.
        """
        ids = torch.arange(PROBE_TOKENS, device=self.device).remainder(self.vocab_size).unsqueeze(0)
        own = self.model(input_ids=ids, use_cache=False).logits[0]
        hidden = self.hidden(ids)[0]
        ids[0, -1] = PROBE_TOKENS % self.vocab_size
        other = self.hidden(ids)[0]
        ours = self.head.logits(hidden)
        if self.ranks is not None:
            if self.ranks.apart(hidden):
                return f"Transformers' plan for {type(self.model).__name__} leaves ranks with different hidden states"
            own = own[:, self.ranks.words]
        own = own.to(ours)
        if own.shape != ours.shape:
            return f"its logits are {tuple(own.shape)} where its output embedding makes {tuple(ours.shape)}"
        if own.isnan().any():
            return "its logits are not numbers (NaN); look at its weights"
        # The products of a quantised head are rounded as those of half precision, and ours are not.
        low = self._unpacked is not None or self.dtype in (torch.bfloat16, torch.float16)
        tolerance = 3e-2 if low else 1e-3
        if not torch.allclose(ours, own, rtol=tolerance, atol=tolerance * float(own.abs().max()), equal_nan=True):
            return (
                f"{type(self.model).__name__} changes its logits in a way lark-fast does not know "
                f"(largest difference {float((ours - own).abs().max()):.3g})"
            )
        # All before the last, for a few may round otherwise (experts); in LLM.int8 a large token has all others do so.
        moved = (hidden - other).float().norm(dim=1) / hidden.float().norm(dim=1)
        if bool((moved[:-1] > (1e-1 if self.quantised else tolerance)).all()):
            return f"{type(self.model).__name__} lets tokens see those behind them: it is no causal model"
        return None


def _is_plain(weight: Tensor) -> bool:
    """Whether it is a matrix of numbers, and not of codes."""
    return type(weight.data) is Tensor and weight.is_floating_point() and weight.element_size() > 1 and weight.ndim == 2


@torch.no_grad()
def _unpacked(output: nn.Module, width: int, dtype: torch.dtype) -> Tensor:
    """``[V, D]`` the weight of a head that is stored in fewer bits: what it makes of the unit vectors."""
    units = torch.eye(width, dtype=dtype, device=output.weight.device)
    logits = output(units)
    bias = getattr(output, "bias", None)
    return (logits if bias is None else logits - bias).T.contiguous()


def refuse_adapted_head(output: nn.Module) -> None:
    """The layer underneath a PEFT adapter has a ``weight`` without what the adapter has learned.

    Raises:
        ValueError: the output embedding carries one.
    """
    if hasattr(output, "base_layer") or hasattr(output, "token_adapter"):
        raise ValueError(
            f"the output embedding carries a PEFT adapter ({type(output).__name__}), which a loss without logits "
            "would leave out: take it out of target_modules, or train the whole head as one of modules_to_save"
        )


@contextmanager
def stop_before_head(output: nn.Module) -> Iterator[list[Tensor]]:
    """Let the output embedding hand its input over and answer with logits of width 0, so that none is computed."""
    captured: list[Tensor] = []

    def keep(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        captured.append(hidden)
        return hidden[..., :0]

    own = output.__dict__.get("forward")
    output.forward = keep
    try:
        yield captured
    finally:
        if own is None:
            del output.forward
        else:
            output.forward = own


def load_student(
    student: str | Path | StudentFiles,
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: bool = True,
    quiet: bool = False,
    tensor_parallel: bool = False,
) -> Student:
    """Load a student from a directory or a Hugging Face id, ready to score.

    Args:
        student: a directory with config.json and safetensors, one with an adapter, or a hub id (``org/name@revision``).
        base: an adapter's base, where it is not where the adapter says.
        device: "auto" (a GPU where there is one), or what ``torch.device`` takes.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on a GPU; on a CPU bfloat16 where it
            multiplies that in hardware, else float32. Quantised weights stay as they are.
        device_map: spread the model over several devices, host memory and disk instead: "auto", "balanced",
            "balanced_low_0", "sequential" or a JSON file, as accelerate has it.
        trust_remote_code: run model code that the checkpoint brings along.
        tokenizer: load the tokenizer too.
        quiet: do not tell of tensors that have no place in the model.
        tensor_parallel: spread the model over the ranks of the default process group, which all make this call; see
            ``tensor_parallel.py``.

    Raises:
        UserError: nothing there, or it cannot be loaded; the message says what is missing.
    """
    files = find_student(student, base) if isinstance(student, str | Path) else student
    if device_map is not None and device != "auto":
        raise UserError(f"--device {device} and --device-map {device_map}: give one of them")
    placed = read_device_map(device_map)
    place = choose_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: not one of auto, {', '.join(DTYPES)}")
    # What a quantised checkpoint is computed in, its quantiser has said.
    chosen = DTYPES.get(dtype if files.quantised else dtype_on(place, dtype), "auto")
    how = {"trust_remote_code": trust_remote_code}
    if tensor_parallel:
        if placed is not None:
            raise UserError(f"--device-map {device_map}: spreads a student by itself; leave it or torchrun away")
        model = load_over_ranks(files, place, chosen, **how)
    else:
        model = load_model(files, place, chosen, device_map=placed, quiet=quiet, **how)
    words = load_tokenizer(files, trust_remote_code) if tokenizer else None
    try:
        loaded = Student(model, words, files)
    except Exception as error:  # the model itself may fail here: a kernel that is missing, a shape that it has not
        raise UserError(f"{files.name}: cannot be loaded as a student: {one_line(error)}") from error
    if words is not None:
        _refuse_long_vocabulary(words, loaded)
    return loaded


def load_tokenizer(student: str | Path | StudentFiles, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load a tokenizer whose splitting rules are those of its tokenizer.json.

    AutoTokenizer may rebuild the pre-tokenizer from the model type; where it does, the file is loaded as it stands.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = found(student)
    directory = files.tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        file = directory / "tokenizer.json"
        if file.exists() and tokenizer.is_fast:
            written = json.loads(Tokenizer.from_file(str(file)).to_str())
            loaded = json.loads(tokenizer.backend_tokenizer.to_str())
            if any(written.get(part) != loaded.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{files.name}: its tokenizer cannot be loaded: {one_line(error)}") from error
    return tokenizer


def load_config(student: str | Path | StudentFiles, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """The (text) config of a student, without its weights."""
    from transformers import AutoConfig

    files = found(student)
    try:
        return AutoConfig.from_pretrained(files.base, trust_remote_code=trust_remote_code).get_text_config()
    except Exception as error:  # of a config that is none: anything at all
        raise UserError(f"{files.name}: its config cannot be loaded: {one_line(error)}") from error


def _refuse_long_vocabulary(tokenizer: "PreTrainedTokenizerBase", student: Student) -> None:
    """Refuse a tokenizer of another model. Added tokens may lie beyond (Gemma's for images): no text has them.

    Raises:
        UserError: words of the tokenizer have no row in the embedding.
    """
    added, size = tokenizer.added_tokens_decoder, student.vocab_size
    beyond = [token for token in tokenizer.get_vocab().values() if token >= size and token not in added]
    end = tokenizer.eos_token_id
    if beyond or (end is not None and end >= size):
        raise UserError(
            f"{student.path}: the tokenizer does not go with the model: its ids reach {max([*beyond, end or 0])}, and "
            f"the model's embedding has {size} rows; is it another model's?"
        )


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises:
        UserError: there is no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch_device(name, f"--device {name}")
    refuse_missing_device(device, f"--device {name}")
    return device


def dtype_on(device: torch.device, dtype: str) -> str:
    """What "auto" is on a device: on a CPU what it multiplies well; elsewhere "auto", which is the checkpoint's own."""
    if dtype == "auto" and device.type == "cpu":
        return "bfloat16" if multiplies_bfloat16(device) else "float32"
    return dtype


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it. A CPU that emulates them is many times slower than in float32."""
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
