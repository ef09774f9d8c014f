"""Attention that stays inside each sequence: whole models alone and packed, and each form against its definition."""

import copy
import inspect
import random
import tracemalloc
from functools import cache
from itertools import accumulate, pairwise
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_fast import Scorer, attention
from lark_fast.attention import NAME, Pack, UnknownAttentionError, packed_attention
from lark_fast.kernels.token_stats import token_stats
from lark_fast.rendering.renderer import Rendered
from lark_fast.student import Student
from tests.tiny import PACKABLE, UNPACKABLE, tiny_decoder, tiny_llama

VOCABULARY = 101
# Longer than every window but 2, 2 and 3; LongRoPE's border of 32 from both sides.
LENGTHS = (33, 3, 60, 17, 2, 2, 32, 9)
# How far a mean may lie from that of the trajectory alone: in float32 from float64's, in bfloat16 (eight bits, two
# layers, means of one token to forty-five) from bfloat16's. A token that sees one that it should not moves a mean by a
# hundredth or more (test_a_wrong_pack_would_be_noticed).
FLOAT32, BFLOAT16 = 1e-6, 2e-2
# Top experts are picked by comparison: in bfloat16 another rounding picks another one.
ROUTED = {"mixtral", "qwen3_moe", "deepseek3"}


@cache
def trajectories():
    chance = random.Random(0)
    made = []
    for length in LENGTHS:
        ids = [chance.randrange(VOCABULARY) for _ in range(length)]
        prompt = 1 + length // 4
        labels = [-100] * prompt + ids[prompt:]
        if length > 20:
            labels[length // 2] = -100
        made.append(Rendered(input_ids=ids, labels=labels, truncated=False))
    return made


def eager(model):
    """The same model with its own attention, in float64."""
    assert model.config._attn_implementation in ("eager", "sdpa")
    double = copy.deepcopy(model).double().eval()
    if double._can_set_experts_implementation():
        double.set_experts_implementation("eager")  # the fast one knows no float64
    return double


@torch.no_grad()
def alone(model, item):
    """(nll, Brier score) of a trajectory by itself, from the logits of the model's own forward pass."""
    logits = model(input_ids=torch.tensor([item.input_ids]), use_cache=False).logits[0, :-1].double()
    labels = torch.tensor(item.labels[1:])
    scored = labels != -100
    log_p = logits[scored].log_softmax(-1)
    log_label = log_p.gather(1, labels[scored].unsqueeze(1)).squeeze(1)
    return -log_label.mean().item(), (1 - 2 * log_label.exp() + log_p.exp().square().sum(1)).mean().item()


def one_by_one(model, items):
    """The truth: each trajectory alone, through eager attention in float64."""
    double = eager(model)
    return [alone(double, item) for item in items]


def assert_close(scores, expected, tolerance):
    for score, (nll, brier) in zip(scores, expected, strict=True):
        assert score.nll == pytest.approx(nll, rel=tolerance, abs=0)
        assert score.brier == pytest.approx(brier, rel=tolerance, abs=0)


def in_one_row(scorer, items, order):
    """The means of trajectories that lie in one pack in exactly this order."""
    with scorer.passes() as passes:
        batch = passes.layout.prepare(order, [(items[i].input_ids, items[i].labels) for i in order])
        ((back, scored),) = passes.run([batch])
    means = dict(zip(back.members, (SimpleNamespace(**one.means) for one in scored), strict=True))
    return [means[i] for i in range(len(items))]


@pytest.mark.parametrize("name", PACKABLE)
def test_batch_mates_order_and_packing_change_no_score(name):
    model, items = tiny_decoder(name, VOCABULARY), trajectories()
    expected = one_by_one(model, items)
    order = list(range(len(items)))
    chance = random.Random(1)
    for tokens_per_batch in (1, 50, 64, 100, 10_000):
        chance.shuffle(order)
        scorer = Scorer(model, tokens_per_batch=tokens_per_batch)
        assert scorer.student.unpackable is None
        scores = scorer.score_rendered([items[i] for i in order])
        assert_close(scores, [expected[i] for i in order], FLOAT32)
    if scorer.student.length_regime is None:
        for _ in range(3):
            chance.shuffle(order)
            assert_close(in_one_row(scorer, items, order), expected, FLOAT32)


@pytest.mark.parametrize("name", [name for name in PACKABLE if name not in ROUTED])
def test_in_bfloat16_within_its_resolution(name):
    model, items = tiny_decoder(name, VOCABULARY).bfloat16(), trajectories()
    by_themselves = Scorer(model, tokens_per_batch=1).score_rendered(items)
    truth = one_by_one(model, items)
    # What the model's own attention makes of it in bfloat16; sums over the logits as ours.
    student, own = Student(model), []
    head = student.head
    for item in items:
        with torch.no_grad():
            hidden = student.hidden(torch.tensor([item.input_ids]))[0, :-1]
        labels = torch.tensor(item.labels[1:])
        stats = token_stats(hidden, head.weight, labels, bias=head.bias, softcap=head.softcap)
        own.append((stats.nll.nanmean().item(), stats.brier.nanmean().item()))
    allowed = 2 * np.linalg.norm(np.divide(own, truth) - 1, axis=0)
    for tokens_per_batch in (64, 10_000):
        together = Scorer(model, tokens_per_batch=tokens_per_batch).score_rendered(items)
        assert_close(together, [(one.nll, one.brier) for one in by_themselves], BFLOAT16)
        ours = [(one.nll, one.brier) for one in together]
        assert (np.linalg.norm(np.divide(ours, truth) - 1, axis=0) <= allowed).all()


def wrong_places(ids, pack, places):
    return ids, pack, torch.arange(ids.shape[1]).unsqueeze(0)


def wrong_bounds(ids, pack, places):
    return ids, Pack.of([ids.shape[1]]), places


@pytest.mark.parametrize(
    ("name", "fault"),
    # Rotary places are relative: where they begin is nothing that a score tells.
    [("llama", wrong_bounds), ("gemma2", wrong_bounds), ("gpt2", wrong_bounds), ("gpt2", wrong_places)],
)
def test_a_wrong_pack_would_be_noticed(name, fault, monkeypatch):
    model, items = tiny_decoder(name, VOCABULARY), trajectories()
    scorer = Scorer(model)
    assert scorer.student.unpackable is None
    right = Student.hidden
    monkeypatch.setattr(Student, "hidden", lambda self, ids, pack, places, _: right(self, *fault(ids, pack, places)))
    scores = in_one_row(scorer, items, range(len(items)))
    expected = one_by_one(model, items)
    assert max(abs(score.nll / nll - 1) for score, (nll, _) in zip(scores, expected, strict=True)) > 1e-2


def dense(query, key, value, bounds, scaling, window, softcap):
    """The definition, in float64: all scores, a mask over them; ``[1, T, H, e]``."""
    query, key, value = (x[0].double() for x in (query, key, value))
    groups, n_tokens = len(query) // len(key), query.shape[1]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    seen = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    for start, end in pairwise(bounds):
        for token in range(start, end):
            first = start if window is None else max(start, token - window + 1)
            seen[token, first : token + 1] = True
    scores = query @ key.transpose(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(0, 1).unsqueeze(0)


def operands(lengths, heads, widths, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    n_tokens = sum(lengths)
    shapes = [(1, h, n_tokens, w) for h, w in zip((heads[0], heads[1], heads[1]), (*widths[:1], *widths), strict=True)]
    # Scores with a standard deviation of 1.5: soft caps bend them, and no token has all the weight.
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return (1.5 * query).to(dtype), key.to(dtype), value.to(dtype), Pack.of(lengths)


def apart(ours, truth):
    assert ours.shape == truth.shape
    return ((ours.double() - truth).norm() / truth.norm()).item()


HEADS_AND_WIDTHS = [((4, 4), (8, 8)), ((4, 2), (8, 8)), ((6, 1), (16, 16)), ((4, 2), (24, 10)), ((3, 3), (5, 7))]
REACHES = [(None, None), (5, None), (1, None), (1000, None), (None, 1.5), (5, 1.5)]
SHORT = (30, 0, 3, 61, 1, 0, 17, 0, 0)  # empty ones among them and behind, as in a row that is filled up


@pytest.mark.parametrize(("window", "softcap"), REACHES)
@pytest.mark.parametrize(("heads", "widths"), HEADS_AND_WIDTHS)
@pytest.mark.parametrize("form", [attention.blocks, attention.flex])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_forms_against_the_definition(form, heads, widths, window, softcap):
    query, key, value, pack = operands(SHORT, heads, widths)
    scaling = 0.8 * widths[0] ** -0.5
    truth = dense(query, key, value, pack.bounds, scaling, window, softcap)
    assert apart(form(query, key, value, pack, scaling, window, softcap), truth) < 1e-6


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (512, None), (513, None), (700, 1.5), (37, None)])
def test_blocks_of_sequences_longer_than_a_block(window, softcap):
    lengths = (3, 2 * attention.BLOCK + 1, attention.BLOCK, 0, attention.BLOCK + 1)
    query, key, value, pack = operands(lengths, (2, 1), (8, 6))
    truth = dense(query, key, value, pack.bounds, 0.3, window, softcap)
    assert apart(attention.blocks(query, key, value, pack, 0.3, window, softcap), truth) < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any),
    block=st.integers(1, 8),
    window=st.none() | st.integers(1, 25),
    softcap=st.none() | st.floats(0.5, 5),
    groups=st.sampled_from([(2, 2), (2, 1)]),
)
def test_blocks_of_any_size(lengths, block, window, softcap, groups):
    query, key, value, pack = operands(lengths, groups, (4, 3))
    truth = dense(query, key, value, pack.bounds, 0.5, window, softcap)
    with mock.patch.object(attention, "BLOCK", block):
        assert apart(attention.blocks(query, key, value, pack, 0.5, window, softcap), truth) < 1e-6


@pytest.mark.parametrize(("window", "softcap"), REACHES)
def test_blocks_in_bfloat16_no_further_off_than_eager_attention(window, softcap):
    query, key, value, pack = operands(SHORT, (4, 2), (8, 8), dtype=torch.bfloat16)
    truth = dense(query, key, value, pack.bounds, 0.35, window, softcap)
    # As Transformers' eager attention: products in bfloat16, softmax in float32.
    scores = query[0] @ key[0].repeat_interleave(2, 0).transpose(1, 2) * 0.35
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    where = torch.searchsorted(pack.cu_seqlens, torch.arange(sum(SHORT)), right=True)
    ages = torch.arange(sum(SHORT)).unsqueeze(1) - torch.arange(sum(SHORT))
    seen = (where.unsqueeze(1) == where) & (ages >= 0) & (ages < (window or sum(SHORT)))
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).bfloat16()
    eager = (p @ value[0].repeat_interleave(2, 0)).transpose(0, 1).unsqueeze(0)
    ours = attention.blocks(query, key, value, pack, 0.35, window, softcap)
    assert ours.dtype == torch.bfloat16
    assert apart(ours, truth) <= 1.5 * apart(eager, truth)


def flash(takes_groups):
    """What flash attention makes of the arguments of torch's varlen_attn, query by query."""

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), **more):
        assert more == ({"enable_gqa": True} if key.shape[1] != query.shape[1] else {})
        assert takes_groups or not more
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert type(max_q) is type(max_k) is int
        left, right = window_size
        groups = query.shape[1] // key.shape[1]
        out = torch.full((*query.shape[:2], value.shape[2]), float("nan"))
        longest = 0
        for (first, end), (first_key, end_key) in zip(
            pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
        ):
            longest = max(longest, end - first)
            for at in range(end - first):
                begin = 0 if left < 0 else max(0, at - left)
                behind = end_key - first_key if right < 0 else min(end_key - first_key, at + right + 1)
                for head in range(query.shape[1]):
                    keys = slice(first_key + begin, first_key + behind)
                    p = (key[keys, head // groups] @ query[first + at, head] * scale).softmax(0)
                    out[first + at, head] = p @ value[keys, head // groups]
        assert max_q == max_k == longest  # flash attention reads no further
        return out

    return attend


@pytest.mark.parametrize("takes_groups", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_what_flash_attention_is_told(heads, window, takes_groups, monkeypatch):
    monkeypatch.setattr(attention, "_varlen_attn", lambda: (flash(takes_groups), takes_groups))
    query, key, value, pack = operands(SHORT, heads, (8, 8))
    truth = dense(query, key, value, pack.bounds, 0.3, window, None)
    assert apart(attention.varlen(query, key, value, pack, 0.3, window, None), truth) < 1e-6


@pytest.mark.parametrize(("window", "reach"), [(None, (-1, 0)), (1, (0, 0)), (5, (4, 0))])
def test_flash_attention_counts_the_tokens_before_the_query(window, reach, monkeypatch):
    calls = []

    def attend(query, *args, **more):
        calls.append(more)
        return query

    monkeypatch.setattr(attention, "_varlen_attn", lambda: (attend, True))
    query, key, value, pack = operands(SHORT, (2, 2), (8, 8))
    attention.varlen(query, key, value, pack, 0.3, window, None)
    assert calls == [{"scale": 0.3, "window_size": reach}]


def test_varlen_attn_of_this_torch(monkeypatch):
    from torch.nn.attention import varlen

    attention._varlen_attn.cache_clear()
    found = attention._varlen_attn()
    taken = inspect.signature(varlen.varlen_attn).parameters
    assert found == (varlen.varlen_attn, "enable_gqa" in taken)
    assert list(taken)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(taken)
    # One that takes no window is of no use.
    attention._varlen_attn.cache_clear()
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal=False: query)
    assert attention._varlen_attn() is None
    attention._varlen_attn.cache_clear()


@pytest.mark.parametrize(
    ("changes", "softcap", "has", "form"),
    [
        ({}, None, "varlen", "varlen"),
        ({}, None, "varlen flash2", "varlen"),
        ({}, None, "varlen flash2 flash3", "flash"),
        ({}, 2.0, "varlen flash3", "flash"),
        ({}, 2.0, "varlen flash2", "flash"),
        ({}, None, "flash2", "flash"),
        ({"dtype": torch.float16}, None, "varlen", "varlen"),
        ({}, None, "", "flex"),
        ({}, 2.0, "varlen", "flex"),
        ({"dtype": torch.float32}, None, "varlen flash2 flash3", "flex"),
        ({"widths": (512, 512)}, None, "varlen flash2 flash3", "flex"),
        ({"widths": (192, 128)}, None, "varlen flash2 flash3", "flex"),
        ({"widths": (60, 60)}, None, "varlen flash2 flash3", "flex"),
        ({"capability": (7, 5)}, None, "varlen flash2 flash3", "flex"),
        ({"is_cuda": False}, None, "varlen flash2 flash3", "blocks"),
    ],
)
def test_which_form_where(changes, softcap, has, form, monkeypatch):
    made = {"is_cuda": True, "dtype": torch.bfloat16, "widths": (64, 64), "capability": (9, 0)} | changes
    monkeypatch.setattr(attention, "_varlen_attn", lambda: (None, True) if "varlen" in has else None)
    monkeypatch.setattr(attention, "_flash_attn_2", lambda: print if "flash2" in has else None)
    monkeypatch.setattr(attention, "_flash_attn_3", lambda capability: print if "flash3" in has else None)
    monkeypatch.setattr(attention, "_capability", lambda device: made["capability"])
    query, value = (SimpleNamespace(**made, device=None, shape=(1, 4, 9, width)) for width in made["widths"])
    assert attention._form(query, value, softcap) is getattr(attention, form)


def test_flash_attn_3_is_for_hopper(monkeypatch):
    module = SimpleNamespace(flash_attn_varlen_func=print)
    monkeypatch.setattr(attention, "import_module", lambda name: module)
    attention._flash_attn_3.cache_clear()
    assert [attention._flash_attn_3((major, 0)) for major in (8, 9, 10)] == [None, print, None]
    attention._flash_attn_3.cache_clear()


@pytest.mark.parametrize("in_a_tuple", [True, False])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0), (3, 2.0)])
def test_what_the_flash_attn_package_is_told(window, softcap, in_a_tuple, monkeypatch):
    def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap=0.0):
        assert causal
        assert q.shape[0] == k.shape[0] == int(cu_q[-1])
        if softcap:
            assert (softmax_scale, window_size) == (0.3, (-1 if window is None else window - 1, 0))
            out = q
        else:
            out = flash(True)(
                q, k, v, cu_q, cu_k, max_q, max_k, scale=softmax_scale, window_size=window_size, enable_gqa=True
            )
        return (out, None) if in_a_tuple else out

    monkeypatch.setattr(attention, "_capability", lambda device: (8, 0))
    monkeypatch.setattr(attention, "_flash_attn_2", lambda: attend)
    query, key, value, pack = operands(SHORT, (4, 2), (8, 8))
    out = attention.flash(query, key, value, pack, 0.3, window, softcap)
    truth = query.transpose(1, 2) if softcap else dense(query, key, value, pack.bounds, 0.3, window, None)
    assert apart(out, truth) < 1e-6


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
def test_a_block_mask_is_the_mask(window):
    lengths = [1, 127, 130, 0, 400, 3, 256, 90]
    pack = Pack.of(lengths)
    n_tokens = sum(lengths)
    where = np.repeat(np.arange(len(lengths)), lengths)
    at = np.arange(n_tokens)
    seen = (where[:, None] == where) & (at[:, None] >= at) & (at[:, None] - at < (window or n_tokens))
    mask = pack.block_mask(window)
    kinds = (mask.kv_num_blocks, mask.kv_indices, True), (mask.full_kv_num_blocks, mask.full_kv_indices, False)
    found = np.zeros_like(seen)
    for counts, indices, in_part in kinds:
        for row, (count, columns) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
            for column in columns[:count]:
                block = np.ix_(at[row * 128 :][:128], at[column * 128 :][:128])
                assert not found[block].any(), "a block counts twice"
                queries, keys = (torch.from_numpy(index) for index in block)
                found[block] = mask.mask_mod(None, None, queries, keys) if in_part else True
    assert (found == seen).all()


def test_a_block_mask_of_a_long_pack_is_small():
    tracemalloc.start()
    Pack.of([131_072]).block_mask(4096)
    Pack.of([200] * 160).block_mask(None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20  # of numpy's arrays: all pairs would be 16 GiB


MODULE = SimpleNamespace(is_causal=True)


def test_scores_are_scaled_by_the_key_width_unless_told_otherwise():
    query, key, value, pack = operands(SHORT, (4, 2), (24, 10))
    out, weights = packed_attention(MODULE, query, key, value, None, pack=pack)
    assert weights is None
    assert apart(out, dense(query, key, value, pack.bounds, 24**-0.5, None, None)) < 1e-6
    # A model hands on more than is of interest here.
    more, _ = packed_attention(
        MODULE,
        query,
        key,
        value,
        None,
        pack=pack,
        scaling=1.0,
        dropout=0.0,
        cu_seq_lens_q=None,
        is_causal=None,
        s_aux=None,
    )
    assert apart(more, dense(query, key, value, pack.bounds, 1.0, None, None)) < 1e-6


SLIDING = SimpleNamespace(
    is_causal=True, layer_idx=1, config=SimpleNamespace(layer_types=["full_attention", "sliding_attention"])
)


@pytest.mark.parametrize(
    ("module", "mask", "arguments", "message"),
    [
        (MODULE, None, {"pack": None}, "no pack"),
        (MODULE, torch.ones(1), {}, "a mask of its own"),
        (MODULE, None, {"s_aux": torch.ones(1)}, "s_aux"),
        (MODULE, None, {"position_bias": torch.ones(1)}, "position_bias"),
        (MODULE, None, {"is_causal": False}, "no pack, or"),
        (SimpleNamespace(is_causal=False), None, {}, "no pack, or"),
        (SLIDING, None, {}, "does not tell its attention the sliding window"),
        (SimpleNamespace(config=SimpleNamespace(sliding_window=5)), None, {}, "does not tell"),
    ],
)
def test_what_packs_are_not_known_to_keep_is_refused(module, mask, arguments, message):
    query, key, value, pack = operands((5, 2), (2, 2), (8, 8))
    with pytest.raises(UnknownAttentionError, match=message):
        packed_attention(module, query, key, value, mask, **({"pack": pack} | arguments))


def test_two_rows_are_refused():
    query, key, value, pack = operands((5, 2), (2, 2), (8, 8))
    with pytest.raises(UnknownAttentionError):
        packed_attention(MODULE, *(x.expand(2, -1, -1, -1) for x in (query, key, value)), None, pack=pack)


def test_where_the_sequences_of_a_pack_lie():
    pack = Pack.of([3, 0, 5])
    assert tuple(pack.bounds) == (0, *accumulate([3, 0, 5]))
    assert pack.cu_seqlens.tolist() == [0, 3, 3, 8]
    assert pack.cu_seqlens.dtype == torch.int32
    assert pack.longest == 5
    assert Pack.of([]).longest == 0


def test_one_block_mask_for_all_layers_of_a_kind():
    pack = Pack.of([30, 60])
    assert pack.block_mask(None) is pack.block_mask(None)
    assert pack.block_mask(5) is pack.block_mask(5) is not pack.block_mask(6)


@pytest.mark.parametrize("name", UNPACKABLE)
def test_models_that_cannot_be_packed_are_known(name):
    assert Student(tiny_decoder(name)).unpackable


def test_the_attention_in_use_comes_back():
    model = tiny_llama()
    student = Student(model)
    packing = student.packing()
    with packing:
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "eager"
