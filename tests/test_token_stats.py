"""The blocked head against the float64 definition."""

import math

import pytest
import torch

from lark_fast.kernels.token_stats import IGNORE_INDEX, token_stats, token_stats_naive
from lark_fast.kernels.token_stats_torch import CPU_BLOCK

FIELDS = ("nll", "brier", "entropy", "brier_topk")


def problem(T, D, V, scale=1.0, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g)
    weight = torch.randn(V, D, generator=g) * scale / math.sqrt(D)
    labels = torch.randint(0, V, (T,), generator=g)
    # Half of the labels are the most probable token: confident rows are where plain formulas cancel.
    best = (hidden @ weight.T).argmax(1)
    labels = torch.where(torch.arange(T) % 2 == 0, best, labels)
    return hidden.to(dtype), weight.to(dtype), labels


def assert_close(ours, truth, rtol=2e-5):
    for field in FIELDS:
        a, b = getattr(ours, field), getattr(truth, field)
        if b is not None:
            assert torch.equal(a.isnan(), b.isnan()), field
            torch.testing.assert_close(
                a.double(), b, rtol=rtol, atol=1e-6, equal_nan=True, msg=lambda m, f=field: f"{f}: {m}"
            )
    assert torch.equal(ours.rank, truth.rank)


# V = 1 has no other column; 17 and 4097 leave odd remainders of a group and of a block; 9,001 is prime: three blocks.
@pytest.mark.parametrize("V", [1, 2, 17, 4097, 9001])
@pytest.mark.parametrize(("T", "D"), [(1, 8), (37, 33), (CPU_BLOCK[0] + 3, 16)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
def test_against_float64(T, D, V, scale):
    hidden, weight, labels = problem(T, D, V, scale)
    # float32 inputs near a tie could rank either way; integers make every product exact, so ranks must agree.
    hidden, weight = hidden.mul(4).round(), weight.mul(4).round()
    k = min(5, V)
    assert_close(token_stats(hidden, weight, labels, top_k=k), token_stats_naive(hidden, weight, labels, top_k=k))


def test_confident_tokens_keep_their_digits():
    # p_y within 1e-4 .. 4e-9 of 1: 1 - 2p + sum p^2 and logsumexp - z_y lose every digit here in float32,
    # while float64 still has seven of them.
    gaps = torch.linspace(9, 20, 19)
    hidden = gaps.unsqueeze(1)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    labels = torch.zeros(19, dtype=torch.long)
    ours, truth = token_stats(hidden, weight, labels), token_stats_naive(hidden, weight, labels)
    for field in ("nll", "brier", "entropy"):
        torch.testing.assert_close(getattr(ours, field).double(), getattr(truth, field), rtol=1e-5, atol=0)


def test_peaky_logits_up_to_200():
    hidden, weight, labels = problem(64, 64, 3001, scale=50.0)
    assert (hidden @ weight.T).abs().max() > 150
    ours, truth = token_stats(hidden, weight, labels, top_k=50), token_stats_naive(hidden, weight, labels, top_k=50)
    for field in FIELDS:
        torch.testing.assert_close(getattr(ours, field).double(), getattr(truth, field), rtol=1e-4, atol=1e-4)


def test_float64_inputs_stay_float64():
    hidden, weight, labels = problem(29, 31, 2111, 5.0, dtype=torch.float64)
    ours = token_stats(hidden, weight, labels, top_k=7)
    assert ours.nll.dtype == torch.float64
    assert_close(ours, token_stats_naive(hidden, weight, labels, top_k=7), rtol=1e-12)


def test_bfloat16_beats_bfloat16_logits_tenfold():
    hidden, weight, labels = problem(128, 256, 4099, 30.0, dtype=torch.bfloat16)
    truth = token_stats_naive(hidden, weight, labels).nll
    eager = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
    ours = token_stats(hidden, weight, labels).nll
    assert (ours - truth).norm() * 10 < (eager - truth).norm()


def test_bias_scale_and_softcap():
    hidden, weight, labels = problem(33, 16, 1500, 20.0)
    head = {"bias": torch.randn(1500), "softcap": 15.0, "logit_scale": 0.37}
    ours, truth = (f(hidden, weight, labels, top_k=9, **head) for f in (token_stats, token_stats_naive))
    for field in FIELDS:
        torch.testing.assert_close(getattr(ours, field).double(), getattr(truth, field), rtol=1e-4, atol=1e-5)


def test_ties_take_the_better_rank_in_every_block():
    # All logits equal over several blocks: rank 1 for whichever label, and the label is one of any k.
    V = 2 * CPU_BLOCK[1] + 5
    labels = torch.tensor([0, CPU_BLOCK[1], V - 1])
    stats = token_stats(torch.ones(3, 4), torch.ones(V, 4), labels, top_k=2)
    assert stats.rank.tolist() == [1, 1, 1]
    torch.testing.assert_close(stats.brier_topk, torch.full((3,), 0.5))
    torch.testing.assert_close(stats.nll, torch.full((3,), math.log(V)))


def test_ignored_rows_are_nan_and_change_nothing():
    hidden, weight, labels = problem(40, 8, 300)
    masked = labels.clone()
    masked[::3] = IGNORE_INDEX
    all_rows, some = token_stats(hidden, weight, labels, top_k=4), token_stats(hidden, weight, masked, top_k=4)
    kept = masked != IGNORE_INDEX
    for field in FIELDS:
        assert getattr(some, field)[~kept].isnan().all()
        torch.testing.assert_close(getattr(some, field)[kept], getattr(all_rows, field)[kept], rtol=1e-6, atol=1e-6)
    assert (some.rank[~kept] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_rows_are_reported_and_do_not_spread(bad):
    hidden, weight, labels = problem(12, 8, 2500)
    clean = token_stats(hidden, weight, labels, top_k=3)
    hidden[5, 2] = bad
    broken = token_stats(hidden, weight, labels, top_k=3)
    others = torch.arange(12) != 5
    assert broken.rank[5] == 0
    for field in FIELDS:
        assert getattr(broken, field)[5].isnan()
        assert torch.equal(getattr(broken, field)[others], getattr(clean, field)[others])


def test_masked_vocabulary_of_minus_infinity():
    # Some checkpoints mask unused words with a bias of -inf; whole blocks of them are fine.
    hidden, weight, labels = problem(6, 8, 3000)
    bias = torch.zeros(3000)
    bias[900:] = float("-inf")
    labels = labels % 900
    small = token_stats(hidden, weight[:900], labels, top_k=4)
    masked = token_stats(hidden, weight, labels, bias=bias, top_k=4)
    for field in FIELDS:
        torch.testing.assert_close(getattr(masked, field), getattr(small, field))


def test_no_rows_and_strided_rows():
    hidden, weight, labels = problem(20, 8, 100)
    empty = token_stats(hidden[:0], weight, labels[:0], top_k=2)
    assert empty.nll.shape == (0,)
    strided = token_stats(hidden[::2], weight.T.contiguous().T, labels[::2])
    torch.testing.assert_close(strided.nll, token_stats(hidden, weight, labels).nll[::2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 4, 5)}, "expected"),
        ({"weight": torch.zeros(7, 4)}, "D differs"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, "T differs"),
        ({"labels": torch.tensor([0, 7, 1])}, "label 7"),
        ({"labels": torch.tensor([0, -1, 1])}, "label -1"),
        ({"top_k": 0}, "top_k=0"),
        ({"bias": torch.zeros(6)}, "bias"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_wrong_arguments_name_the_axis(change, message):
    arguments = {"hidden": torch.zeros(3, 5), "weight": torch.zeros(7, 5), "labels": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        token_stats(**(arguments | change))
