"""Attention that stays inside each sequence of a pack, registered with Transformers as an attention function.

A pack is one row of tokens in which sequences lie one behind another. No mask is ever made for it: the function is told
where the sequences begin and hands each to the fastest form at hand.

    varlen   torch's own variable-length flash attention: a GPU, half precision
    flex     FlexAttention: a GPU, whatever the first cannot do (float32, a soft cap, wide heads)
    blocks   scaled_dot_product_attention, a sequence at a time: everywhere else
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

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


class UnknownAttentionError(Exception):
    """The model's attention asks for something that packs are not known to keep."""


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Where the sequences of a pack lie.

    Attributes:
        bounds: host integers, S + 1 of them: sequence s is tokens bounds[s] to bounds[s + 1].
        cu_seqlens: ``[S + 1]`` int32, the same on the device.
        longest: no sequence has more tokens.
    """

    bounds: Sequence[int]
    cu_seqlens: Tensor
    longest: int
    _masks: dict[int | None, "BlockMask"] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Pack":
        """A pack of sequences of these lengths."""
        bounds = (0, *accumulate(lengths))
        return cls(bounds, torch.tensor(bounds, dtype=torch.int32, device=device), max(lengths, default=0))

    def arguments(self) -> dict[str, Any]:
        """What a model's forward hands on to its attention: to ours, and under the names that flash-attn's has."""
        return {
            "pack": self,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }

    def block_mask(self, window: int | None) -> "BlockMask":
        """FlexAttention's mask: the same sequence, not later, and inside the window; made once for all layers."""
        if window not in self._masks:
            from torch.nn.attention.flex_attention import create_block_mask

            n_tokens, device = self.bounds[-1], self.cu_seqlens.device
            of_sequence = torch.searchsorted(self.cu_seqlens, torch.arange(n_tokens, device=device), right=True)

            def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                seen = (of_sequence[query] == of_sequence[key]) & (query >= key)
                return seen if window is None else seen & (query - key < window)

            self._masks[window] = create_block_mask(sees, None, None, n_tokens, n_tokens, device=device)
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
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a pack, as Transformers calls it.

    Args:
        module: the layer's attention.
        query: ``[1, H, T, d]``.
        key: ``[1, G, T, d]``, H a multiple of G.
        value: ``[1, G, T, e]``.
        attention_mask: none is ever made.
        pack: where the sequences lie.
        scaling: factor of the scores; 1 / sqrt(d) where it is None.
        sliding_window: how many tokens a query sees, itself among them.
        softcap: scores s become softcap * tanh(s / softcap).
        is_causal: True or None: the module's own.
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
    return _form(query, value, softcap)(query, key, value, pack, scaling, sliding_window, softcap), None


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
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and softcap is None and query.shape[-1] == value.shape[-1] <= WIDEST_FLASH_HEAD and _varlen_attn():
        return varlen
    return flex


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
    # Flash attention counts the tokens left of the query, Transformers the query too.
    reach = (-1 if window is None else window - 1, 0)
    bounds, longest = pack.cu_seqlens, pack.longest
    return attend(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=reach, **more).unsqueeze(0)


def flex(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """By FlexAttention; shapes as in ``packed_attention``."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

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
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """A sequence at a time; shapes as in ``packed_attention``. Scores exist for ``BLOCK`` queries at most."""
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    grouped = query.shape[1] != key.shape[1]
    for start, end in pairwise(pack.bounds):
        if start == end:
            continue
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        if softcap is None and (window is None or window >= end - start):
            done = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
            out[:, start:end] = done.transpose(1, 2)
            continue
        for first in range(0, end - start, BLOCK):
            behind = min(first + BLOCK, end - start)
            oldest = 0 if window is None else max(0, first - window + 1)
            part = _block(
                q[:, :, first:behind], k[:, :, oldest:behind], v[:, :, oldest:behind], scaling, window, softcap
            )
            out[:, start + first : start + behind] = part.transpose(1, 2)
    return out


def _block(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None) -> Tensor:
    """The last queries of the keys ``[1, G, K, d]``, under a mask; softmax in float32 as eager attention has it."""
    grouped = q.shape[1] != k.shape[1]
    ages = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device).unsqueeze(1)
    ages = ages - torch.arange(k.shape[2], device=q.device)  # [Q, K]
    seen = ages >= 0 if window is None else (ages >= 0) & (ages < window)
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=grouped)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


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


def fastest_attention(model: "PreTrainedModel") -> str:
    """Transformers' name of the attention to use for packs: flash-attn 3 or 2 where installed and of use, else ours."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    weight = next(model.parameters())
    if weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
        if model._supports_flash_attn and is_flash_attn_3_available() and not capped:
            return "flash_attention_3"
        if model._supports_flash_attn and is_flash_attn_2_available() and (capped or not _varlen_attn()):
            return "flash_attention_2"
    return NAME


@contextmanager
def attention_of(model: "PreTrainedModel", name: str) -> Iterator[None]:
    """Let the model use that attention function inside the block."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
