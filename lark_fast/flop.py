"""The FLOP that a scoring pass cannot do without, and how many a second the machine can do at its best.

Counted is what every implementation has to multiply: causal attention, no padding, the experts a token is sent to, the
head on scored rows only. So FLOP / seconds / ``matmul_ceiling`` says how close a pass is to the best there is, and
padding or a head on prompts lower it.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

GPU_PRODUCT, CPU_PRODUCT = 8192, 1024  # n of the square product: as fast as the machine gets, and no larger
SLICE = 1 << 16  # lengths looked at together, so that those of a large pool are never copied whole
PRODUCT_SECONDS, PRODUCT_RUNS = 0.2, 20  # of timing it, whichever ends first

# What configs call the number of experts a token is sent to.
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k")
_WITHOUT_ATTENTION = ("linear_attention", "mamba", "conv", "moe", "recurrent")  # of the kinds in ``layer_types``


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardCost:
    """FLOP of a forward pass, as constants of a model.

    body        2 x parameters of the matrices between embedding and head, a token; of a layer's experts, those that
                a token is sent to. A multiply and an add each count.
    attention   2 x heads x (head_dim of queries + head_dim of values) = 4 x heads x head_dim, a layer and (query, key)
                pair; a sequence of L tokens has L (L + 1) / 2 pairs, in a layer with a sliding window w
                w (w + 1) / 2 + (L - w) w once L > w, and in one with chunks the sum over its chunks
    head        2 x D x V, a scored token

    Recurrent layers (Mamba, linear attention) count by their matrices alone, and layers that attend to keys of their
    own choice as if they attended to all.
    """

    body: float
    attention: tuple[tuple[str, float, float], ...]  # ("sliding" | "chunked", its size, FLOP a pair); full: inf
    head: float

    def __add__(self, other: "ForwardCost") -> "ForwardCost":
        """Of a pass through both."""
        return ForwardCost(
            body=self.body + other.body, attention=self.attention + other.attention, head=self.head + other.head
        )

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "ForwardCost":
        """The cost of a Transformers causal language model; one on the ``meta`` device does as well.

        Raises:
            ValueError: the model has no output embedding.
        """
        output = model.get_output_embeddings()
        if output is None:
            raise ValueError(f"{type(model).__name__} has no output embedding: it is not a causal language model")
        body = sum(2.0 * matrix.active * matrix.shape.numel() for matrix in matrices(model))
        return cls(
            body=body,
            attention=_attention(model.config.get_text_config()),
            head=2.0 * shape_of(output, output.weight).numel(),
        )

    def flop(self, lengths: Sequence[int] | np.ndarray, n_scored: int) -> float:
        """FLOP of one forward pass, or of many.

        Args:
            lengths: ``[N]`` tokens of every sequence.
            n_scored: tokens that reach the head, of all sequences together.
        """
        lengths, total = np.asarray(lengths), self.head * n_scored
        for start in range(0, len(lengths), SLICE):
            part = lengths[start : start + SLICE].astype(np.float64)  # squares of int32 lengths would not fit
            attention = sum(flop * _pairs(kind, size, part) for kind, size, flop in self.attention)
            total += float(self.body * part.sum() + attention)
        return float(total)


def forward_flop(model: "PreTrainedModel", lengths: Sequence[int] | np.ndarray, n_scored: int) -> float:
    """``ForwardCost.flop`` of a model, for one use."""
    return ForwardCost.of(model).flop(lengths, n_scored)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A parameter that tokens are multiplied with."""

    block: str  # the module that it is part of, without its own: "layers.0.mlp"
    shape: "torch.Size"  # of the numbers that it stands for, in however few bits they are stored
    own: "torch.Size"  # of those that this rank has of it, where it is spread over ranks
    active: float = 1.0  # the share of it that one token meets
    experts: int = 1  # that it is made of


def matrices(model: "PreTrainedModel") -> Iterator[Matrix]:
    """The matrices between a model's embedding and its head.

    Experts are, as Transformers stores them, one parameter [experts, in, out] a matrix, or modules in a list called
    ``experts``.
    """
    from torch import nn

    from lark_fast.tensor_parallel import on_this_rank

    decoder = model.get_decoder()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = {id(module.weight) for module in ends if module is not None} | _of_towers(decoder)
    top_k = _active_experts(model.config.get_text_config())
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for own, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2 or own.endswith("bias") or id(weight) in outside:
                continue
            n = 1 if isinstance(module, nn.Conv1d | nn.Conv2d) else _n_experts(decoder, name, weight)
            active = min(top_k / n, 1.0) if n > 1 and top_k else 1.0
            # A fused parameter is of its module; a Linear's weight is of the module around it.
            block = name if own != "weight" else name.rpartition(".")[0]
            shape = shape_of(module, weight) if own == "weight" else weight.shape
            spread = hasattr(weight, "to_local")
            own_shape = on_this_rank(weight).shape if spread else shape
            yield Matrix(block=block, shape=weight.shape if spread else shape, own=own_shape, active=active, experts=n)


def shape_of(module: "nn.Module", weight: "Tensor") -> "torch.Size":
    """``[out, in]`` of a linear layer's weight, also where it is packed into other shapes; of others, their own."""
    from torch import Size

    out, width = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return Size((out, width)) if weight.ndim == 2 and out and width else weight.shape


def _of_towers(decoder: "nn.Module") -> set[int]:
    """Parameters of what stands beside the layers and reads images or sound (Phi-4-multimodal): text never meets it."""
    from torch import nn
    from transformers import PreTrainedModel

    beside = [child for child in decoder.children() if not isinstance(child, nn.ModuleList)]
    if len(beside) == len(list(decoder.children())):
        return set()  # the layers are elsewhere, perhaps in one of these
    towers = (child for child in beside if any(isinstance(module, PreTrainedModel) for module in child.modules()))
    return {id(parameter) for tower in towers for parameter in tower.parameters()}


def _n_experts(decoder: "nn.Module", name: str, weight: "Tensor") -> int:
    """Of how many experts a parameter of the module ``name`` is a part or the whole; 1 where it is of none."""
    if weight.ndim == 3:
        return weight.shape[0]
    path = name.split(".")
    if "experts" not in path:
        return 1
    experts = decoder.get_submodule(".".join(path[: path.index("experts") + 1]))
    return len(experts) if hasattr(experts, "__len__") else getattr(experts, "num_experts", 1)


def _layer_configs(config: Any) -> list[Any]:
    """A text config as each layer sees it."""
    return list(getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers)


def _active_experts(config: Any) -> float:
    """Experts a token is sent to, a mean over layers; 0 where the config does not say."""
    counts = []
    for layer in _layer_configs(config):
        places = (layer, getattr(layer, "ffn_config", None))  # DBRX keeps it in the latter
        known = (getattr(place, name, None) for place in places for name in _ACTIVE_EXPERTS)
        counts.append(np.mean(next(filter(None, known), 0)))  # HunYuan: a list, one a layer
    return float(np.mean(counts))


def _attention(config: Any) -> tuple[tuple[str, float, float], ...]:
    """``ForwardCost.attention`` of a text config: layers of one kind together."""
    layers = _layer_configs(config)
    # Mistral, Mixtral, Phi-3 name no kinds: the window, where there is one, holds in every layer.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    total: Counter[tuple[str, float]] = Counter()
    for kind, layer in zip(kinds, layers, strict=False):
        if "sliding" in kind:
            total["sliding", getattr(layer, "sliding_window", None) or math.inf] += _flop_a_pair(layer)
        elif "chunked" in kind:
            total["chunked", layer.attention_chunk_size] += _flop_a_pair(layer)
        elif kind not in _WITHOUT_ATTENTION:
            # Gemma-4's layers without a window have wider heads.
            total["sliding", math.inf] += _flop_a_pair(layer, getattr(layer, "global_head_dim", None))
    return tuple((kind, size, flop) for (kind, size), flop in total.items())


def _flop_a_pair(config: Any, head_dim: int | None = None) -> float:
    heads = config.num_attention_heads
    of_values = head_dim or getattr(config, "head_dim", None) or config.hidden_size // heads
    of_queries = of_values
    if getattr(config, "v_head_dim", None):  # latent attention: DeepSeek
        of_queries, of_values = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return 2.0 * heads * (of_queries + of_values)


def _pairs(kind: str, size: float, lengths: np.ndarray) -> float:
    """(query, key) pairs of causal attention over sequences of these lengths ``[N]``."""
    if kind == "chunked":
        whole, rest = np.divmod(lengths, size)
        return float((whole * size * (size + 1) / 2 + rest * (rest + 1) / 2).sum())
    seen = np.minimum(lengths, size)
    return float((seen * (seen + 1) / 2 + (lengths - seen) * seen).sum())


def square_product(
    device: "torch.device", dtype: "torch.dtype", n: int | None = None
) -> tuple[Callable[[], "Tensor"], float]:
    """A square matrix product, by default one that runs as fast as the machine can, and its 2 n^3 FLOP."""
    import torch

    n = n or (CPU_PRODUCT if device.type == "cpu" else GPU_PRODUCT)
    generator = torch.Generator(device).manual_seed(0)  # not the global one, whose state is somebody else's
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        one = torch.ones(n, 1, device=device)
        fp8 = {"scale_a": one, "scale_b": one.T, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        return lambda: torch._scaled_mm(a, b.T, **fp8), 2.0 * n**3
    return lambda: a @ b, 2.0 * n**3


def matmul_ceiling(device: "torch.device | str", dtype: "torch.dtype") -> float:
    """FLOP/s of ``square_product`` at its best: what a forward pass would reach if it were nothing but large products.

    To be measured while nothing else runs: 0.3 s on a CPU; on a GPU about as long and, for that time, 1 GiB at most.
    NaN where the product cannot be taken (no memory is left): a gauge must not stop what it measures.
    """
    import torch

    device = torch.device(device)
    try:
        if device.type == "cpu":  # some have no instructions for float16 or bfloat16, and take seconds
            small, flop = square_product(device, dtype, CPU_PRODUCT // 4)
            seconds = min(_seconds(small, device) for _ in range(2))
            if 64 * seconds > PRODUCT_SECONDS:
                return flop / seconds
        product, flop = square_product(device, dtype)
        _seconds(product, device)  # libraries choose and load their kernels
        runs = [_seconds(product, device)]
        while len(runs) < PRODUCT_RUNS and sum(runs) < PRODUCT_SECONDS:
            runs.append(_seconds(product, device))
    except RuntimeError:  # out of memory, or a dtype that this device does not multiply
        return math.nan
    return flop / min(runs)


def with_prefix(value: float, unit: str) -> str:
    """A large number as people read it: "98.3 GFLOP/s"."""
    prefixes = "", "k", "M", "G", "T", "P", "E"
    power = min(max(int(math.log10(value) // 3), 0), len(prefixes) - 1) if 0 < value < math.inf else 0
    return f"{three_digits(value / 1000**power)} {prefixes[power]}{unit}"


def three_digits(value: float) -> str:
    """A number with three digits that count, and never in powers of ten."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def _seconds(run: Callable[[], Any], device: "torch.device") -> float:
    import torch

    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
