"""FLOP of a forward pass against torch's own count of them, and against arithmetic done by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from lark_fast.flop import ForwardCost, forward_flop, matmul_ceiling, square_product, with_prefix
from tests.tiny import TINY_MODELS, tiny_gemma2, tiny_llama

TOKENS = 37
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 80,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# What they have that others have not: wider heads than hidden / heads (Qwen3, Gemma-3); fused projections (Phi-3);
# [in, out] weights (GPT-2); 3-D experts (all mixtures), whose layout GPT-OSS turns around and DBRX flattens; a dense
# layer among sparse ones and shared experts (DeepSeek).
KINDS = {
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": None},
    "Gemma3Text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "Phi3": {},
    "Olmo2": {},
    "GPT2": {"n_inner": 48},
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Qwen3Moe": EXPERTS | {"num_experts": 6, "head_dim": 8},
    "GraniteMoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
    "DeepseekV3": EXPERTS | LATENT,
    "Dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2, "hidden_size": 32},
    },
}


def make(kind, **changes):
    settings = SMALL | KINDS[kind] | {"attn_implementation": "eager", "experts_implementation": "eager"} | changes
    if kind in ("Dbrx", "GPT2"):
        names = {"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
        names = names if kind == "Dbrx" else {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
        settings = {names.get(name, name): value for name, value in settings.items()}
        del settings["num_key_value_heads"], settings["intermediate_size"]
    config = getattr(transformers, f"{kind}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def torch_count(model):
    """What torch counts in a forward pass of TOKENS tokens, but for the angles of rotary embeddings."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(TOKENS).unsqueeze(0) % 80, use_cache=False)
    counts = counter.get_flop_counts()
    angles = sum(sum(ops.values()) for name, ops in counts.items() if name.split(".")[-1].startswith("rotary_emb"))
    return counter.get_total_flops() - angles


@pytest.mark.parametrize("kind", [*TINY_MODELS, *KINDS])
def test_as_torch_counts(kind):
    model = TINY_MODELS[kind]() if kind in TINY_MODELS else make(kind)
    cost = ForwardCost.of(model)
    # Eager attention takes the whole square; every token has its logits.
    square = sum(flop for _, _, flop in cost.attention) * TOKENS**2
    assert cost.body * TOKENS + square + cost.head * TOKENS == torch_count(model)


def test_attention_by_hand():
    model = tiny_llama()
    (only,) = ForwardCost.of(model).attention
    assert only == ("sliding", math.inf, 2 * 4 * 4 * 8)  # layers x 4 x heads x head_dim
    lengths = [1, 7, 50]
    seen = sum(length * (length + 1) / 2 for length in lengths)
    body = 2 * 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)  # 2 FLOP x layers x (q, o; k, v; gate, up, down)
    assert forward_flop(model, lengths, 20) == body * 58 + only[2] * seen + 2 * 32 * 400 * 20


def pairs_by_mask(length, sees):
    return sum(sees(query, key) for query in range(length) for key in range(query + 1))


@pytest.mark.parametrize("length", [1, 5, 6, 7, 8, 40])
def test_layers_that_see_less(length):
    window, chunk = 6, 7
    cost = ForwardCost(body=0.0, attention=(("sliding", window, 10.0), ("chunked", chunk, 1.0)), head=0.0)
    sliding = pairs_by_mask(length, lambda query, key: key > query - window)
    chunked = pairs_by_mask(length, lambda query, key: key // chunk == query // chunk)
    assert cost.flop([length, length], 0) == 2 * (10 * sliding + chunked)


def test_which_layers_have_a_window():
    """By layer in Gemma-2; everywhere in Mistral, whose config names no layers; nowhere in Qwen2 unless asked for."""
    assert {(kind, size) for kind, size, _ in ForwardCost.of(tiny_gemma2()).attention} == {
        ("sliding", 64),
        ("sliding", math.inf),
    }
    assert [size for _, size, _ in ForwardCost.of(make("Mistral", sliding_window=9)).attention] == [9]
    assert [size for _, size, _ in ForwardCost.of(TINY_MODELS["qwen2"](sliding_window=9)).attention] == [math.inf]


def test_layers_that_differ():
    """Transformers lets settings differ by layer."""
    changes = {"sliding_window": None, "per_layer_config": {2: {"sliding_window": 9}}}
    model = make("Mistral", **changes)
    assert ForwardCost.of(model).attention == (("sliding", math.inf, 2 * 4 * 4 * 8), ("sliding", 9, 4 * 4 * 8))


def test_window_is_the_one_that_transformers_masks_with():
    """Of a layer with a window, the weights that are not 0 are the pairs counted."""
    model, window = make("Mistral", sliding_window=9), 9
    with torch.no_grad():
        attentions = model(torch.arange(TOKENS).unsqueeze(0), output_attentions=True, use_cache=False).attentions
    cost = ForwardCost(body=0.0, attention=(("sliding", window, 1.0),), head=0.0)
    assert cost.flop([TOKENS], 0) == int((attentions[0][0, 0] > 0).sum())


def test_a_7b_student():
    """Qwen2.5-7B: 6.53 G parameters in the layers' matrices and 0.545 G in the head; no weight is allocated for it."""
    sizes = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = transformers.Qwen2Config(**sizes, intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    cost = ForwardCost.of(model)
    assert cost.body / 2 == pytest.approx(6.53e9, rel=1e-3)
    assert cost.head / 2 == 3584 * 152064
    assert cost.flop([8191], 0) / 8191 - cost.body == 4 * 3584 * 28 * 4096  # mean kv length 4,096


def test_a_language_model_inside_another_model():
    """A model of text and images: only its text part counts, and the config that describes it."""
    text = SMALL | {"head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    whole = transformers.Gemma3ForConditionalGeneration(config)
    alone = transformers.Gemma3ForCausalLM(config.text_config)
    assert ForwardCost.of(whole) == ForwardCost.of(alone)


def test_lengths_of_any_kind_and_beyond_int32():
    cost = ForwardCost.of(tiny_llama())
    for lengths, kind in itertools.product(([3, 4, 100_000], [2]), (list, np.int32, np.int64)):
        array = lengths if kind is list else np.array(lengths, dtype=kind)
        assert cost.flop(array, 5) == sum(cost.flop([length], 0) for length in lengths) + 5 * cost.head
    assert cost.flop(np.array([], dtype=np.int32), 0) == 0


def test_no_head_is_an_error():
    with pytest.raises(ValueError, match="no output embedding"):
        ForwardCost.of(tiny_llama().model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ceiling_is_a_number_and_leaves_the_random_state(dtype):
    before = torch.get_rng_state()
    assert matmul_ceiling("cpu", dtype) > 1e6
    assert torch.equal(torch.get_rng_state(), before)


def test_ceiling_without_memory_is_not_a_number(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("lark_fast.flop.square_product", fail)
    assert math.isnan(matmul_ceiling("cpu", torch.float32))


def test_square_product():
    product, flop = square_product(torch.device("cpu"), torch.float32, 12)
    assert product().shape == (12, 12)
    assert flop == 2 * 12**3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 X"), (12.34, "12.3 X"), (999.7, "1000 X"), (1e3, "1 kX"), (7.9e14, "790 TX"), (1e22, "10000 EX")],
)
def test_with_prefix(value, text):
    assert with_prefix(value, "X") == text


def test_with_prefix_of_what_is_not_known():
    assert [with_prefix(value, "X") for value in (math.nan, math.inf)] == ["nan X", "inf X"]
