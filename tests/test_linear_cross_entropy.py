"""The blocked loss against gradcheck, the naive definition and autograd."""

import itertools
import math

import pytest
import torch

from lark_fast.kernels import linear_cross_entropy as module
from lark_fast.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy, linear_cross_entropy_naive

HEAD = {"softcap": 3.0, "logit_scale": 0.7}


@pytest.fixture
def small_blocks(monkeypatch):
    """Seven rows of 13 columns to a block, so that a few dozen rows cross several borders."""
    monkeypatch.setattr(module, "CPU_LOGITS", 7 * 13)
    monkeypatch.setattr(module, "MIN_ROWS", 1)


def problem(T, D, V, *, dtype=torch.float32, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) * scale / math.sqrt(D)
    bias = torch.randn(V, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, (T,), generator=g)
    labels[::5] = IGNORE_INDEX
    token_weights = torch.rand(T, generator=g, dtype=torch.float64)
    token_weights[1::7] = 0.0
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], labels, token_weights


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0}, {"logit_scale": 0.7}, HEAD])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(head, with_bias):
    (hidden, weight, bias), labels, token_weights = problem(17, 5, 13, dtype=torch.float64)
    bias = bias if with_bias else None

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, token_weights, bias=bias, **head)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


# One row, one column, primes, and 63 = 9 blocks exactly, 64 = one row over: where off-by-one errors of blocks live.
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("T", [1, 6, 7, 8, 63, 64, 101])
@pytest.mark.parametrize(("D", "V"), [(1, 2), (33, 13), (8, 101)])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_the_definition(T, D, V, weighted):
    (hidden, weight, bias), labels, token_weights = problem(T, D, V, dtype=torch.float64)
    token_weights = token_weights if weighted else None
    ours = linear_cross_entropy(hidden, weight, labels, token_weights, bias=bias, **HEAD)
    truth = linear_cross_entropy_naive(hidden, weight, labels, token_weights, bias=bias, **HEAD)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)
    tensors = (hidden, weight, bias)
    torch.testing.assert_close(gradients(3.0 * ours, tensors), gradients(3.0 * truth, tensors), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_float32_is_as_good_as_plain_torch(impl):
    (hidden, weight, _), labels, token_weights = problem(252, 123, 507)
    ours = linear_cross_entropy(hidden, weight, labels, token_weights, impl=impl)
    exact_inputs = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    truth = linear_cross_entropy_naive(*exact_inputs, labels, token_weights)
    plain = linear_cross_entropy_naive(hidden, weight, labels, token_weights)
    assert ours.dtype == torch.float32
    assert abs(ours.item() / truth.item() - 1) < 1e-6
    exact = gradients(truth, exact_inputs)
    triples = zip(gradients(ours, (hidden, weight)), gradients(plain, (hidden, weight)), exact, strict=True)
    for a, b, t in triples:
        assert (a - t).norm() <= 2 * (b - t).norm() + 1e-7 * t.norm()


def test_low_precision_gradients_keep_their_dtype_and_beat_plain_low_precision():
    # The budget is plain torch's own error in bf16; sums in float32 must stay well inside it.
    (hidden, weight, bias), labels, token_weights = problem(252, 123, 507, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, token_weights, bias=bias)
    exact_inputs = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    truth = linear_cross_entropy_naive(*exact_inputs[:2], labels, token_weights, bias=exact_inputs[2])
    logits = torch.nn.functional.linear(hidden, weight, bias)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none").float()
    plain = (nll * token_weights.float()).sum()
    assert loss.dtype == torch.float32
    assert abs(loss - truth) < 1e-5 * truth
    tensors = (hidden, weight, bias)
    for a, b, t in zip(
        gradients(loss, tensors), gradients(plain, tensors), gradients(truth, exact_inputs), strict=True
    ):
        assert a.dtype == torch.bfloat16
        assert (a.double() - t).norm() < 0.6 * (b.double() - t).norm()


def test_confident_tokens_keep_their_digits():
    # p_y within 1e-4 .. 4e-9 of 1, where logsumexp - z_y and p_y - 1 lose every digit in float32.
    hidden = torch.linspace(9, 20, 19).unsqueeze(1).requires_grad_()
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    for row in range(19):
        token_weights = torch.zeros(19)
        token_weights[row] = 1.0
        labels = torch.zeros(19, dtype=torch.long)
        loss = linear_cross_entropy(hidden, weight, labels, token_weights)
        exact = hidden.detach().double().requires_grad_()
        truth = linear_cross_entropy_naive(exact, weight.double(), labels, token_weights)
        assert abs(loss.item() / truth.item() - 1) < 1e-5
        (slope,), (true_slope,) = gradients(loss, [hidden]), gradients(truth, [exact])
        assert abs(slope[row].item() / true_slope[row].item() - 1) < 1e-5


@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)])
def test_only_the_gradients_asked_for(wanted):
    tensors, labels, token_weights = problem(23, 7, 11, dtype=torch.float64)
    all_of_them = gradients(linear_cross_entropy_naive(*tensors[:2], labels, token_weights, bias=tensors[2]), tensors)
    mine = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    linear_cross_entropy(*mine[:2], labels, token_weights, bias=mine[2]).backward()
    for tensor, gradient, needed in zip(mine, all_of_them, wanted, strict=True):
        assert (tensor.grad is not None) == needed
        if needed:
            torch.testing.assert_close(tensor.grad, gradient)


def test_no_gradients_are_made_when_none_can_be_used(monkeypatch):
    (hidden, weight, _), labels, _ = problem(9, 4, 6)
    with_grad = linear_cross_entropy(hidden, weight, labels)

    def never(*_):
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(module, "_add_gradients", never)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels), with_grad)
    assert torch.equal(linear_cross_entropy(hidden.detach(), weight.detach(), labels), with_grad)


def test_rows_that_do_not_count_may_hold_anything():
    (hidden, weight, _), labels, token_weights = problem(29, 6, 10, dtype=torch.float64)
    expected = linear_cross_entropy_naive(hidden, weight, labels, token_weights)
    with torch.no_grad():
        hidden[(labels == IGNORE_INDEX) | (token_weights == 0)] = float("nan")
    loss = linear_cross_entropy(hidden, weight, labels, token_weights)
    torch.testing.assert_close(loss, expected)
    of_hidden, of_weight = gradients(loss, (hidden, weight))
    assert of_hidden.isfinite().all()
    assert of_weight.isfinite().all()
    assert not of_hidden[labels == IGNORE_INDEX].any()


@pytest.mark.parametrize("case", ["all ignored", "all weights 0", "no rows"])
def test_nothing_counts(case):
    (hidden, weight, bias), labels, token_weights = problem(0 if case == "no rows" else 8, 4, 6)
    if case == "all ignored":
        labels, token_weights = torch.full_like(labels, IGNORE_INDEX), None
    elif case == "all weights 0":
        token_weights = torch.zeros_like(token_weights)
    loss = linear_cross_entropy(hidden, weight, labels, token_weights, bias=bias)
    assert loss.item() == 0.0
    assert not any(g.any() for g in gradients(loss, (hidden, weight, bias)))


def test_a_vocabulary_of_one():
    (hidden, weight, bias), labels, _ = problem(5, 3, 1)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    assert loss.item() == 0.0
    assert not any(g.any() for g in gradients(loss, (hidden, weight, bias)))


def test_non_contiguous_inputs():
    (hidden, weight, _), labels, token_weights = problem(20, 9, 15, dtype=torch.float64)
    strided = torch.empty(9, 40, dtype=torch.float64).T[::2].copy_(hidden.detach()).requires_grad_()
    turned = weight.detach().T.contiguous().T.requires_grad_()
    assert not strided.is_contiguous()
    assert not turned.is_contiguous()
    ours = linear_cross_entropy(strided, turned, labels, token_weights)
    truth = linear_cross_entropy_naive(hidden, weight, labels, token_weights)
    torch.testing.assert_close(gradients(ours, (strided, turned)), gradients(truth, (hidden, weight)))


def test_another_ignore_index():
    (hidden, weight, _), labels, _ = problem(20, 9, 15)
    renamed = labels.masked_fill(labels == IGNORE_INDEX, -1)
    expected = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(linear_cross_entropy(hidden, weight, renamed, ignore_index=-1), expected)


def test_autocast_has_no_say():
    # bf16 hidden with float32 weights is what autocast hands over; the logits must not be rounded to bf16 all the same.
    (hidden, weight, _), labels, token_weights = problem(31, 16, 50)
    low = hidden.detach().bfloat16()
    expected = linear_cross_entropy(low, weight, labels, token_weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(low, weight, labels, token_weights)
        naive = linear_cross_entropy_naive(low, weight, labels, token_weights)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(loss, naive, rtol=1e-6, atol=0)
    assert gradients(loss, [weight])[0].dtype == torch.float32


def test_backward_twice_gives_the_same_gradients():
    (hidden, weight, _), labels, _ = problem(12, 5, 9)
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(first, gradients(loss, (hidden, weight)), rtol=0, atol=0)


BAD = {
    "hidden of three axes": (lambda h, w, y, c: (h.unsqueeze(0), w, y, c), r"hidden \[T, D\]"),
    "D": (lambda h, w, y, c: (h[:, 1:], w, y, c), "D differs"),
    "T": (lambda h, w, y, c: (h[1:], w, y, c), "T differs"),
    "token_weights": (lambda h, w, y, c: (h, w, y, c[1:]), r"token_weights is \[T\]"),
    "weights with gradient": (lambda h, w, y, c: (h, w, y, c.requires_grad_()), "constants"),
    "label too large": (lambda h, w, y, c: (h, w, y + 6, c), "outside"),
    "label negative": (lambda h, w, y, c: (h, w, y * 0 - 1, c), "label -1 is outside"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    (hidden, weight, _), labels, token_weights = problem(8, 4, 6)
    labels = labels.clamp(min=0)
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*change(hidden, weight, labels, token_weights))


def test_bad_bias_and_impl():
    (hidden, weight, bias), labels, _ = problem(8, 4, 6)
    with pytest.raises(ValueError, match=r"bias is \[V\]"):
        linear_cross_entropy(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match="triton"):
        linear_cross_entropy(hidden, weight, labels, impl="triton")
