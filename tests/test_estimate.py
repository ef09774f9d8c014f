"""What a run is said to take before it starts: by hand, and beside the memory that a forward pass really needs."""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from lark_fast.flop import ForwardCost
from lark_fast.scoring.estimate import ESTIMATED, Footprint, estimate
from tests.tiny import tiny_llama

VOCABULARY = 1000
SIZES = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": VOCABULARY,
    "attn_implementation": "sdpa",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Where the MLP is the widest block, where the attention is, and a mixture of experts.
STUDENTS = {
    "wide MLP": ("Llama", {"intermediate_size": 1024}),
    "narrow MLP": ("Qwen3", {"intermediate_size": 192, "head_dim": 32}),
    "experts": (
        "Qwen3Moe",
        {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 4, "head_dim": 32},
    ),
}
LENGTH, MANY = 64, 512


def cost_and_footprint(model):
    return ForwardCost.of(model), Footprint.of(model)


def test_by_hand():
    model = tiny_llama()
    cost, footprint = cost_and_footprint(model)
    lengths = np.array([10, 20, 30], dtype=np.int32)
    said = estimate(cost, lengths, 25, 1e6, footprint=footprint, tokens_per_batch=16, per_token=True)
    assert (said.records, said.input_tokens, said.scored_tokens) == (3, 60, 25)
    assert said.seconds == cost.flop([10, 20, 30], 25) / 1e6
    assert said.pack_tokens == 30  # the longest trajectory is longer than a pack
    assert said.disk_bytes == 3 * 200 + 25 * 20
    assert said.weights_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    # Four times D = 32, then the attention (q and the result, k and v, twice q) or the MLP (gate, up, their product).
    # The vocabulary of 400 is less than a block of words; the head's blocks are of 512 rows.
    assert said.pack_bytes == 30 * (4 * (4 * 32 + max(2 * 32 + 2 * 16 + 2 * 32, 3 * 48)) + 56) + 2 * 4 * 512 * 400
    assert said.memory_bytes == said.weights_bytes + said.pack_bytes


def test_tied_weights_count_once():
    tied, untied = (Footprint.of(tiny_llama(tie_word_embeddings=tie)) for tie in (True, False))
    assert untied.weights - tied.weights == 4 * 400 * 32


def test_a_small_pool_is_a_small_pack():
    said = estimate(
        *(ForwardCost.of(tiny_llama()), [5, 6], 4, 1e9),
        footprint=Footprint(weights=0, token=1.0, head=0),
        tokens_per_batch=2048,
    )
    assert said.pack_tokens == 11


def test_a_7b_student_without_its_weights():
    sizes = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = transformers.Qwen2Config(**sizes, intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cost, footprint = cost_and_footprint(model)
    lengths = np.full(300_000, 8191, dtype=np.int32)  # together more than an int32 holds
    said = estimate(cost, lengths, 0, 7.9e14, footprint=footprint, tokens_per_batch=32768)
    assert said.seconds == pytest.approx(300_000 * 8191 * (2 * 6.525e9 + 1.644e9) / 7.9e14, rel=1e-3)
    assert 14 < said.weights_bytes / 2**30 < 14.5
    assert "12 h 41 min" in said.lines()[0]


@pytest.mark.parametrize("speed", [math.nan, 0.0, math.inf])
def test_no_speed_no_time(speed):
    cost, footprint = cost_and_footprint(tiny_llama())
    said = estimate(cost, [], 0, speed, footprint=footprint, tokens_per_batch=16)
    assert said.records == said.pack_tokens == said.disk_bytes == 0
    assert all(said.lines())
    values = json.loads(json.dumps(said.as_json(), allow_nan=False))
    assert set(values) == {f"estimated_{name}" for name in ESTIMATED}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak memory")
@pytest.mark.parametrize("name", STUDENTS)
def test_memory_of_a_pack_is_what_was_said(name):
    """Half to twice of what a forward pass of so many tokens adds to the process."""
    fresh = get_context("forkserver")  # a process each, that has nothing but its imports
    fresh.set_forkserver_preload(["lark_fast.scoring.scorer", "transformers.models.qwen3_moe.modeling_qwen3_moe"])
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        said, taken = pool.submit(extra_memory, name).result()
    assert taken / 2 < said < taken * 2, f"said {said / 2**20:.0f} MiB, took {taken / 2**20:.0f} MiB"


def extra_memory(name):
    """(estimated, measured) bytes that a pass of MANY sequences adds to the model's own, in this process."""
    from lark_fast import Scorer

    torch.set_num_threads(1)
    kind, changes = STUDENTS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    scorer = Scorer(model, tokens_per_batch=MANY * LENGTH)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (MANY, LENGTH)).tolist()
    scorer.score_tokens(ids[:2], ids[:2])  # libraries and thread pools come in here
    # Not ru_maxrss: Linux starts a child's at its parent's peak, and building the model has a peak of its own.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    scorer.score_tokens(ids, ids)
    return Footprint.of(model).pack(MANY * LENGTH), resident("VmHWM") - before


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
