"""The top-k Brier kernels against the float64 definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_fast.kernels.token_stats import token_stats_from_logits_naive

topk_triton = pytest.importorskip("lark_fast.kernels.topk_triton")
brier_topk = topk_triton.brier_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# How to cut a row of few columns into many groups and several tiles.
SMALL = {"group": 8, "tile": 64}


def normal(T, C, scale=1.0, seed=0):
    return torch.randn(T, C, generator=torch.Generator().manual_seed(seed)) * scale


def labels_for(z, seed=0):
    """Every other label is the most probable word; the others are any."""
    T, C = z.shape
    labels = torch.randint(0, C, (T,), generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.arange(T) % 2 == 0, z.float().nan_to_num(0).argmax(1), labels)


def truth(z, labels, k):
    known = (labels >= 0) & (labels < z.shape[1])
    labels = labels.where(known, -100)
    return token_stats_from_logits_naive(z.double(), labels, top_k=min(k, z.shape[1])).brier_topk


def run(z, labels, k, **head):
    return brier_topk(z.to(DEVICE), labels.to(DEVICE), k, **head).cpu()


def run_cut(z, labels, k, *, group, tile, step=None, scratch=1 << 20):
    """With rows cut into groups of ``group`` columns, of which the last kernel holds ``step``, or all."""
    n_groups = -(-z.shape[1] // group)
    slots = 1 << (max(1, min(k - 1, n_groups)) - 1).bit_length()
    plan = topk_triton.Plan(group, n_groups, slots, min(slots, step or slots), tile)
    return topk_triton.launch(z.to(DEVICE), labels.to(DEVICE), k, None, None, None, plan, scratch).cpu()


def assert_close(ours, expected, rtol=1e-5):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=1e-30, equal_nan=True)


# C = 1 has no other column; 2 has one; 17 leaves an odd rest of a group, 4097 of a tile.
@pytest.mark.parametrize("C", [1, 2, 17, 4097])
@pytest.mark.parametrize("k", [1, 2, 50])
def test_against_float64(C, k):
    z = normal(5, C, 3.0)
    assert_close(run(z, labels_for(z), k), truth(z, labels_for(z), k))


def test_a_real_vocabulary():
    z = normal(2, 152064, 4.0)
    labels = torch.stack([z[0].topk(50).indices[-1], z[1].topk(51).indices[-1]])  # the last inside, the first outside
    ours = run(z, labels, 50)
    assert_close(ours, truth(z, labels, 50))
    assert ours[1] > 1  # no probability at all


@settings(max_examples=8, deadline=None)
@given(
    T=st.integers(1, 3),
    C=st.integers(1, 150),
    k=st.integers(1, 150),
    values=st.sampled_from([1, 3, 1000]),  # that a row is made of
    step=st.sampled_from([2, None]),
    seed=st.integers(0, 1000),
)
def test_any_shape_any_k_many_ties(T, C, k, values, step, seed):
    g = torch.Generator().manual_seed(seed)
    z = torch.randint(0, values, (T, C), generator=g) / 100 * 100 ** torch.rand(1, generator=g)
    labels, k = torch.randint(0, C, (T,), generator=g), min(k, C)
    assert_close(run_cut(z, labels, k, **SMALL, step=step), truth(z, labels, k))


@pytest.mark.parametrize("k", [17, 18, 1000])
def test_k_that_reaches_every_word(k):
    z = normal(3, 17)
    labels = labels_for(z)
    whole = token_stats_from_logits_naive(z.double(), labels).brier
    assert_close(run(z, labels, k), whole)
    assert_close(run(z, labels, k), truth(z, labels, k))


def test_many_groups_are_read_again_and_again(monkeypatch):
    # What a large k of a large vocabulary does: the chosen groups do not fit a program's registers.
    monkeypatch.setattr(topk_triton, "LOGITS_HELD", 64)
    monkeypatch.setattr(topk_triton, "LOGITS_REREAD", 32)
    monkeypatch.setattr(topk_triton, "MAXIMA_HELD", 16)
    z = normal(2, 250)
    plan = topk_triton.Plan.of(250, 100)
    assert plan.n_groups <= 16
    assert plan.step < plan.slots
    labels = torch.stack([z[0].topk(100).indices[-1], z[1].topk(101).indices[-1]])
    assert_close(run(z, labels, 100), truth(z, labels, 100))


@pytest.mark.parametrize("k", [1, 50, 100])
def test_all_equal(k):
    z = torch.full((2, 100), 1.5)
    ours = run(z, torch.tensor([0, 99]), k)
    assert_close(ours, torch.full((2,), (1 - 1 / k) ** 2 + (k - 1) / k**2, dtype=torch.float64))


def test_ties_at_the_kth_logit():
    # k = 5: two words above 300 that tie. A label among these counts as one of the five, wherever it stands; one a hair
    # below them does not.
    z = normal(1, 900).clamp(max=0.5).expand(4, 900).clone()
    z[:, 300:600] = 2.0
    z[:, 7], z[:, 800] = 3.0, 2.5
    z[3, 450] = 2.0 - 2**-22
    labels = torch.tensor([300, 599, 800, 450])
    for ours in (run(z, labels, 5), run_cut(z, labels, 5, **SMALL)):
        assert_close(ours, truth(z, labels, 5))
        assert (ours > 1).tolist() == [False, False, False, True]


def test_zeros_of_both_signs_tie():
    z = torch.full((2, 40), -1.0)
    z[:, 3:20:2], z[:, 4:20:2] = 0.0, -0.0
    labels = torch.tensor([3, 4])
    for k in (1, 4, 17, 18):
        assert_close(run_cut(z, labels, k, **SMALL), truth(z, labels, k))


def test_the_largest_logits_in_one_group():
    z = normal(2, 600)
    z[:, 64:72] += 20
    labels = torch.tensor([66, 5])
    for k in (1, 4, 8, 9):
        assert_close(run_cut(z, labels, k, **SMALL), truth(z, labels, k))


def test_confident_rows_keep_their_digits():
    # p_y within 1e-4 .. 1e-9 of 1, where 1 - 2p + sum p^2 loses every digit of float32. The two other logits are so far
    # apart that the float64 definition, which subtracts, has digits left.
    gaps = torch.linspace(9, 16, 8).unsqueeze(1)
    z = torch.cat([gaps, torch.zeros(8, 1), -torch.ones(8, 1)], 1)
    assert_close(run(z, torch.zeros(8, dtype=torch.long), 2), truth(z, torch.zeros(8, dtype=torch.long), 2))
    # And where the definition has none left: (1 - p)^2 + q^2 = 2 q^2 of two words.
    z = torch.tensor([[25.0, 0.0, -1.0]])
    q = math.exp(-25) / (1 + math.exp(-25))
    assert_close(run(z, torch.tensor([0]), 2), torch.tensor([2 * q * q], dtype=torch.float64))


def test_peaky_logits():
    z = normal(9, 300).mul(70).clamp(-200, 200)
    labels = labels_for(z)
    ours, expected = run(z, labels, 20), truth(z, labels, 20)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=1e-12)


def test_masked_words():
    # Fewer words than k have a logit at all; the label is one of them, or is masked too: then it has no score.
    z = torch.full((4, 500), -math.inf)
    z[:3, 100:340:60] = normal(3, 4)
    labels = torch.tensor([100, 280, 5, 0])
    for ours in (run(z, labels, 50), run_cut(z, labels, 50, **SMALL)):
        assert_close(ours, truth(z, labels, 50))
        assert ours.isnan().tolist() == [False, False, True, True]
    # Only the label has a logit: it is certain.
    z = torch.full((1, 20), -math.inf)
    z[0, 4] = -3.0
    assert run(z, torch.tensor([4]), 5).item() == 0


@pytest.mark.parametrize(
    ("broken", "place"), [(math.nan, 0), (-math.nan, 299), (math.inf, 7), (math.nan, 150), (math.inf, 150)]
)
def test_broken_rows_stay_alone(broken, place):
    z = normal(3, 300)
    labels = torch.tensor([150, 150, 150])
    clean = run(z, labels, 7)
    z[1, place] = broken
    ours = run(z, labels, 7)
    assert ours[1].isnan()
    assert torch.equal(ours[::2], clean[::2])


def test_labels_that_are_no_word():
    z = normal(5, 33)
    z[0] = math.nan
    labels = torch.tensor([-100, -1, 33, 2**40, 32])
    ours = run(z, labels, 4)
    assert ours[:4].isnan().all()
    assert_close(ours[4:], truth(z, labels, 4)[4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_read_as_they_are(dtype):
    z = normal(5, 1030, 2.0).to(dtype)  # with ties, as such logits have
    assert_close(run(z, labels_for(z), 40), truth(z, labels_for(z), 40))


def test_rows_that_lie_apart():
    whole = normal(7, 200)
    z = whole[1::2, 40:171]
    assert z.stride() == (400, 1)
    labels = labels_for(z)
    ours = brier_topk(whole.to(DEVICE)[1::2, 40:171], labels.repeat_interleave(2).to(DEVICE)[::2], 9).cpu()
    assert_close(ours, truth(z, labels, 9))


@pytest.mark.parametrize("head", [{"bias": True}, {"logit_scale": 2}, {"softcap": 5.0}, {"all": True}])
def test_what_the_head_does_to_logits(head):
    x, bias = normal(5, 300, 3.0), normal(1, 300, seed=1)[0]
    if "all" in head:
        head = {"bias": True, "logit_scale": 0.125, "softcap": 3}
    z = x.double()
    if "bias" in head:
        head["bias"] = bias.to(torch.bfloat16).to(DEVICE)
        z = z + bias.to(torch.bfloat16)
    z = z * head.get("logit_scale", 1)
    if "softcap" in head:
        z = head["softcap"] * (z / head["softcap"]).tanh()
    labels = labels_for(z)
    before = x.clone()
    assert_close(run(x, labels, 11, **head), truth(z, labels, 11))
    assert torch.equal(x, before)


def test_masked_words_under_a_negative_scale():
    # Columns beyond the row's end must not come back as +inf.
    z = normal(2, 13)
    assert_close(run(z, torch.tensor([3, 4]), 4, logit_scale=-2.0), truth(-2 * z, torch.tensor([3, 4]), 4))


def test_no_rows():
    assert run(torch.zeros(0, 40), torch.zeros(0, dtype=torch.long), 3).shape == (0,)


def test_rows_do_not_depend_on_their_neighbours_or_on_the_run():
    z = normal(19, 40)
    labels = labels_for(z)
    whole = run(z, labels, 10)
    assert torch.equal(whole, run(z, labels, 10))
    assert torch.equal(whole[5:8], run(z[5:8], labels[5:8], 10))
    parts = run_cut(z, labels, 10, group=8, tile=4096, scratch=1)  # 16 rows at a time
    assert_close(parts, whole.double(), rtol=1e-6)
