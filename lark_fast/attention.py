"""Attention that stays inside each sequence of a pack, registered with Transformers as an attention function.

A pack is one row of tokens in which sequences lie one behind another. No mask of T x T is ever made: the function knows
where the sequences begin, and picks the fastest form at hand.

    flash    flash-attn 3 on Hopper, or 2, where installed: half precision
    varlen   torch's own variable-length flash attention: half precision
    flex     FlexAttention: a GPU, whatever these cannot do (float32, wide heads, old GPUs)
    blocks   scaled_dot_product_attention, a sequence at a time: everywhere else
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel

NAME = "lark_fast_packed"
# Layers whose reach is all that the attention function is told; others (chunked, linear, state-space) are not packed.
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Arguments of some model's attention that change its result and that no form here knows: attention sinks, T5's bias.
UNKNOWN = ("s_aux", "position_bias")
BLOCK = 512  # queries whose scores are made at a time where torch has no fused form
WIDEST_FLASH_HEAD = 256
FLEX_BLOCK = 128


class UnknownAttentionError(Exception):
    """The model's attention asks for something that packs are not known to keep."""


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Where the sequences of a pack lie.

    Attributes:
        bounds: host integers, S + 1 of them: sequence s is tokens bounds[s] to bounds[s + 1].
        cu_seqlens: ``[S + 1]`` int32, the same on the device.
        longest: no sequence has more tokens.
        keys: where the keys of the sequences lie, of which the last are those of the pack's own tokens; None: these
            are all, and lie as the tokens do. See ``lark_fast.past``.
    """

    bounds: Sequence[int]
    cu_seqlens: Tensor
    longest: int
    keys: "Pack | None" = None
    _masks: dict[int | None, "BlockMask"] = field(default_factory=dict)
    _elsewhere: dict[torch.device, "Pack"] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Pack":
        """A pack of sequences of these lengths."""
        bounds = (0, *accumulate(lengths))
        return cls(bounds, torch.tensor(bounds, dtype=torch.int32, device=device), max(lengths, default=0))

    def on(self, device: torch.device) -> "Pack":
        """The same on another device, made once for all layers there."""
        if device == self.cu_seqlens.device:
            return self
        if device not in self._elsewhere:
            bounds = self.cu_seqlens.to(device, non_blocking=True)
            keys = None if self.keys is None else self.keys.on(device)
            self._elsewhere[device] = Pack(self.bounds, bounds, self.longest, keys)
        return self._elsewhere[device]

    def block_mask(self, window: int | None) -> "BlockMask":
        """FlexAttention's mask: the same sequence, not later, and inside the window; made once for all layers."""
        if window not in self._masks:
            self._masks[window] = _block_mask(self.bounds, window, self.cu_seqlens.device)
        return self._masks[window]


@torch.compiler.disable  # compiled layers leave it as it is: its forms are fast, and their loops are not for tracing
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: Pack | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a pack, as Transformers calls it.

    Args:
        module: the layer's attention.
        query: ``[1, H, T, d]``.
        key: ``[1, G, T, d]``, H a multiple of G; as many as ``pack.keys`` says where there are earlier ones.
        value: ``[1, G, T, e]``, as many.
        attention_mask: none is ever made.
        pack: where the sequences lie.
        scaling: factor of the scores; 1 / sqrt(d) where it is None.
        sliding_window: how many tokens a query sees, itself among them.
        softcap: scores s become softcap * tanh(s / softcap).
        is_causal: True or None: the module's own.
        dropout: of the probabilities; anything but 0 takes the form "blocks".
        others: ignored, but for those that would change the result.

    Returns:
        ``[1, T, H, e]`` and None.

    Raises:
        UnknownAttentionError: an argument that is not known here, or a window that is not told.
    """
    unknown = [name for name in UNKNOWN if others.get(name) is not None]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if pack is None or attention_mask is not None or unknown or not causal or len(query) != 1:
        raise UnknownAttentionError(f"{type(module).__name__}: {', '.join(unknown) or 'no pack, or a mask of its own'}")
    if sliding_window is None and _slides(module):
        raise UnknownAttentionError(f"{type(module).__name__} does not tell its attention the sliding window")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotations leave queries and keys in float32 where weights are, and half precision has the faster forms.
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if dropout:
        return blocks(query, key, value, pack, scaling, sliding_window, softcap, dropout), None
    pack = pack.on(query.device)
    form = _form(query, value, softcap)
    if pack.keys is not None and form is flex:  # its masks are those of as many keys as queries
        form = blocks
    return form(query, key, value, pack, scaling, sliding_window, softcap), None


def _slides(module: torch.nn.Module) -> bool:
    """Whether this layer has a window by the config; Qwen2-MoE and PhiMoE leave it to the mask, and none is made."""
    config = getattr(module, "config", None)
    layers = getattr(config, "layer_types", None)
    if layers and getattr(module, "layer_idx", None) is not None:
        return layers[module.layer_idx] == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None


def _form(query: Tensor, value: Tensor, softcap: float | None) -> Callable[..., Tensor]:
    if not query.is_cuda:
        return blocks
    width, capability = query.shape[-1], _capability(query.device)
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and capability >= (8, 0) and width == value.shape[-1] <= WIDEST_FLASH_HEAD and width % 8 == 0:
        if _flash_attn_3(capability):
            return flash
        if softcap is None and _varlen_attn():
            return varlen
        if _flash_attn_2():
            return flash
    return flex


def flash(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """By the flash-attn package; shapes as in ``packed_attention``."""
    attend = _flash_attn_3(_capability(query.device)) or _flash_attn_2()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    more = {} if softcap is None else {"softcap": softcap}
    keys = pack.keys or pack
    out = attend(
        *(q, k, v, pack.cu_seqlens, keys.cu_seqlens, pack.longest, keys.longest),
        softmax_scale=scaling,
        causal=True,
        window_size=_reach(window),
        **more,
    )
    return (out[0] if isinstance(out, tuple) else out).unsqueeze(0)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """By ``torch.nn.attention.varlen``; shapes as in ``packed_attention``."""
    assert softcap is None
    attend, takes_groups = _varlen_attn()
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    more = {}
    if groups > 1 and takes_groups:
        more["enable_gqa"] = True
    elif groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    keys = pack.keys or pack
    lengths = (pack.cu_seqlens, keys.cu_seqlens, pack.longest, keys.longest)
    out = attend(q, k, v, *lengths, scale=scaling, window_size=_reach(window), **more)
    return out.unsqueeze(0)


def _reach(window: int | None) -> tuple[int, int]:
    """Flash attention counts the tokens left and right of the query, Transformers the query too."""
    return (-1 if window is None else window - 1, 0)


def flex(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """By FlexAttention; shapes as in ``packed_attention``."""

    # A tensor, since a number is compiled as one that may change, and that fails inside of score_mod.
    cap = None if softcap is None else torch.full((), softcap, device=query.device)

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    window = None if window is None or window >= pack.longest else window
    out = _flex_attention(query.is_cuda)(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=pack.block_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Pack,
    scaling: float,
    window: int | None,
    softcap: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """A sequence at a time; shapes as in ``packed_attention``. Scores exist for ``BLOCK`` queries at most."""
    parts = []  # [1, t, H, e] each; written into one tensor they would cost a copy of its gradient apiece
    grouped = query.shape[1] != key.shape[1]
    keys = pack.keys or pack
    for (start, end), (begin, behind) in zip(pairwise(pack.bounds), pairwise(keys.bounds), strict=True):
        if start == end:
            continue
        q, (k, v) = query[:, :, start:end], (x[:, :, begin:behind] for x in (key, value))
        earlier = behind - begin - (end - start)
        if not earlier and softcap is None and (window is None or window >= end - start):
            done = scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
            )
            parts.append(done.transpose(1, 2))
            continue
        for first in range(0, end - start, BLOCK):
            last = min(first + BLOCK, end - start)
            oldest = 0 if window is None else max(0, earlier + first - window + 1)
            reach = slice(oldest, earlier + last)
            part = _block(q[:, :, first:last], k[:, :, reach], v[:, :, reach], scaling, window, softcap, dropout)
            parts.append(part.transpose(1, 2))
    return torch.cat(parts, 1) if parts else value.new_empty(1, 0, query.shape[1], value.shape[-1])


def _block(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None, dropout: float
) -> Tensor:
    """The last queries of the keys ``[1, G, K, d]``, under a mask; softmax in float32 as eager attention has it."""
    grouped = q.shape[1] != k.shape[1]
    ages = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device).unsqueeze(1)
    ages = ages - torch.arange(k.shape[2], device=q.device)  # [Q, K]
    seen = ages >= 0 if window is None else (ages >= 0) & (ages < window)
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, seen, dropout, scale=scaling, enable_gqa=grouped)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.dropout(p, dropout, train=True) @ v


def _block_mask(bounds: Sequence[int], window: int | None, device: torch.device) -> "BlockMask":
    """From the bounds alone: which blocks of keys a block of queries sees in part, and which as a whole.

    create_block_mask would make all T x T pairs first.
    """
    from torch.nn.attention.flex_attention import BlockMask

    n_tokens = bounds[-1]
    window = n_tokens if window is None else window
    starts = np.repeat(np.asarray(bounds[:-1]), np.diff(bounds))  # [T] where each token's sequence begins
    first = np.arange(0, n_tokens, FLEX_BLOCK)[:, None]  # [n, 1] of each block of queries
    last = np.minimum(first + FLEX_BLOCK, n_tokens) - 1
    keys = np.arange(len(first)) * FLEX_BLOCK  # [n] where each block of keys begins
    reached = (keys <= first) & (keys + FLEX_BLOCK > np.maximum(starts[first], first - window + 1))
    whole = (keys < first) & (keys >= starts[last]) & (last - keys < window)
    begins = _send(starts, device)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (key >= begins[query]) & (query - key < window)

    parts = []
    for blocks in (reached & ~whole, whole):
        parts += [blocks.sum(1)[None, None], np.argsort(~blocks, axis=1, kind="stable")[None, None]]
    return BlockMask.from_kv_blocks(
        *(_send(part.astype(np.int32), device) for part in parts),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(n_tokens, n_tokens),
    )


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device, without a wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def _flash_attn_3(capability: tuple[int, int]) -> Callable[..., Tensor] | None:
    """Its kernels are Hopper's."""
    return _imported("flash_attn_interface") if capability[0] == 9 else None


@lru_cache(1)
def _flash_attn_2() -> Callable[..., Tensor] | None:
    return _imported("flash_attn")


def _imported(module: str) -> Callable[..., Tensor] | None:
    try:
        return import_module(module).flash_attn_varlen_func
    except (ImportError, OSError, AttributeError, RuntimeError):  # missing, or built for another torch
        return None


@lru_cache(1)
def _varlen_attn() -> tuple[Callable[..., Tensor], bool] | None:
    """torch's varlen_attn and whether it takes grouped heads; None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    return (varlen_attn, "enable_gqa" in parameters) if "window_size" in parameters else None


@lru_cache(2)
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def can_be_packed(model: "PreTrainedModel") -> bool:
    """Whether this kind of model leaves all mixing of tokens to its attention function and tells that its reach."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    return bool(model._supports_attention_backend) and layers <= KNOWN_LAYERS


@contextmanager
def attention_in_packs(model: "PreTrainedModel") -> Iterator[None]:
    """Let the model use ``packed_attention`` inside the block."""
    from transformers import AttentionInterface

    # No mask function goes with the name, so Transformers makes no mask, and looks for none on the device.
    AttentionInterface.register(NAME, packed_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
