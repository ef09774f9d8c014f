"""Every form of the weighted loss against gradcheck, the naive definition and autograd."""

import itertools
import math

import pytest
import torch

from lark_fast.kernels import dispatch
from lark_fast.kernels import linear_cross_entropy as module
from lark_fast.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy, linear_cross_entropy_naive

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = dispatch.FORMS
HEAD = {"softcap": 3.0, "logit_scale": 0.7}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch):
    """A few rows and words to a block, so that a few dozen cross several borders."""
    monkeypatch.setattr(module, "CPU_LOGITS", 7 * 13)
    monkeypatch.setattr(module, "CPU_MIN_ROWS", 1)
    if dispatch.has_triton():
        from lark_fast.kernels import linear_cross_entropy_triton

        monkeypatch.setattr(linear_cross_entropy_triton, "COLUMNS", 64)
        monkeypatch.setattr(linear_cross_entropy_triton, "WORD_STEP", 64)
        monkeypatch.setattr(linear_cross_entropy_triton, "CHUNK_BYTES", 1)


def problem(T, D, V, *, dtype=torch.float32, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) * scale / math.sqrt(D)
    bias = torch.randn(V, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, (T,), generator=g)
    labels[::5] = IGNORE_INDEX
    token_weights = torch.rand(T, generator=g, dtype=torch.float64)
    token_weights[1::7] = 0.0
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in (hidden, weight, bias)]
    return tensors, labels.to(DEVICE), token_weights.to(DEVICE)


def in_float64(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0}, {"logit_scale": 0.7}, HEAD])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(head, with_bias):
    (hidden, weight, bias), labels, token_weights = problem(17, 5, 13, dtype=torch.float64)
    bias = bias if with_bias else None

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, token_weights, bias=bias, impl="torch", **head)

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


# 252 x 48 x 123: no size divides a tile of rows or words; 33: D is no multiple of a step. One row; a vocabulary smaller
# than a tile; several chunks of words with an odd end.
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(252, 48, 123), (1, 33, 5), (40, 16, 331)], ids=str)
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0}, {"logit_scale": -0.7}, HEAD], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_float32(form, head, shape, monkeypatch):
    monkeypatch.setattr(module, "_block_rows", lambda *_, **__: 50)
    (hidden, weight, bias), labels, token_weights = problem(*shape)
    labels[0], token_weights[0] = 3, 0.5
    tensors = (hidden, weight, bias if "softcap" in head else None)
    check_float32(form, tensors, labels, token_weights, head)


def check_float32(form, tensors, labels, token_weights, head):
    """Loss and gradients, under an upstream gradient, are as near to float64 as plain torch's own float32 ones."""
    present = [t for t in tensors if t is not None]
    exact_inputs = in_float64(present)
    arguments = {"bias": tensors[2], **head}
    exact_arguments = arguments | ({} if tensors[2] is None else {"bias": exact_inputs[2]})
    ours = linear_cross_entropy(*tensors[:2], labels, token_weights, impl=form, **arguments)
    plain = linear_cross_entropy_naive(*tensors[:2], labels, token_weights, **arguments)
    truth = linear_cross_entropy_naive(*exact_inputs[:2], labels, token_weights, **exact_arguments)
    assert ours.dtype == torch.float32
    assert abs(ours.item() / truth.item() - 1) < 1e-6
    exact = gradients(-2.5 * truth, exact_inputs)
    triples = zip(gradients(-2.5 * ours, present), gradients(-2.5 * plain, present), exact, strict=True)
    for a, b, t in triples:
        assert (a - t).norm() <= 2 * (b - t).norm() + 3e-7 * t.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_gradients_keep_their_dtype_and_beat_plain_low_precision(form, dtype):
    # The budget is plain torch's own error in that dtype; sums in float32 must stay well inside it. Where the products
    # read bf16, the error of the logits is rounded before the result is: two roundings of 1.7e-3 instead of one.
    tensors, labels, token_weights = problem(252, 123, 507, dtype=dtype)
    hidden, weight, bias = tensors
    loss = linear_cross_entropy(hidden, weight, labels, token_weights, bias=bias, impl=form)
    exact_inputs = in_float64(tensors)
    truth = linear_cross_entropy_naive(*exact_inputs[:2], labels, token_weights, bias=exact_inputs[2])
    logits = torch.nn.functional.linear(hidden, weight, bias)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none").float()
    plain = (nll * token_weights.float()).sum()
    share = 0.6 if dtype == torch.float16 or (form == "torch" and DEVICE.type == "cpu") else 0.75
    assert loss.dtype == torch.float32
    assert abs(loss - truth) < 1e-5 * truth
    for a, b, t in zip(
        gradients(loss, tensors), gradients(plain, tensors), gradients(truth, exact_inputs), strict=True
    ):
        assert a.dtype == dtype
        assert (a.double() - t).norm() < share * (b.double() - t).norm()


@pytest.mark.parametrize("form", ["fused", "chunked"])
def test_float32_weights_with_bfloat16_products(form):
    # The truth is that of the rounded operands; the gradients of float32 tensors must not be rounded to bf16, so what
    # is left is the rounding of the error alone: 2^-9 at most, and half of it in the norm.
    tensors, labels, token_weights = problem(60, 64, 300)
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in tensors[:2]]
    truth = linear_cross_entropy_naive(*rounded, labels, token_weights)
    loss = linear_cross_entropy(*tensors[:2], labels, token_weights, operand_dtype=torch.bfloat16, impl=form)
    assert abs(loss - truth) < 1e-6 * truth
    ours = gradients(loss, tensors[:2])
    for a, t in zip(ours, gradients(truth, rounded), strict=True):
        assert a.dtype == torch.float32
        assert (a - t).norm() < 2**-9 * t.norm()
    assert not torch.equal(ours[1], ours[1].bfloat16().float())


def test_a_cpu_multiplies_in_float32_whatever_is_asked():
    if DEVICE.type != "cpu":
        pytest.skip("of a CPU")
    (hidden, weight, _), labels, _ = problem(9, 8, 20)
    plain = linear_cross_entropy(hidden, weight, labels)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, operand_dtype=dtype), plain)


@pytest.mark.parametrize("form", FORMS)
def test_confident_tokens_keep_their_digits(form):
    # p_y within 1e-4 .. 4e-9 of 1, where logsumexp - z_y and p_y - 1 lose every digit in float32.
    hidden = torch.linspace(9, 20, 19, device=DEVICE).unsqueeze(1).requires_grad_()
    weight = torch.tensor([[1.0], [0.0], [-1.0]], device=DEVICE)
    labels = torch.zeros(19, dtype=torch.long, device=DEVICE)
    exact = hidden.detach().double().requires_grad_()
    for row in range(0, 19, 1 if form == "torch" else 6):
        token_weights = torch.zeros(19, device=DEVICE)
        token_weights[row] = 1.0
        loss = linear_cross_entropy(hidden, weight, labels, token_weights, impl=form)
        truth = linear_cross_entropy_naive(exact, weight.double(), labels, token_weights)
        assert abs(loss.item() / truth.item() - 1) < 1e-5
        (slope,), (true_slope,) = gradients(loss, [hidden]), gradients(truth, [exact])
        assert abs(slope[row].item() / true_slope[row].item() - 1) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_peaky_logits_up_to_200(form):
    (hidden, weight, _), labels, token_weights = problem(64, 32, 300, scale=40.0)
    assert (hidden @ weight.T).abs().max() > 150
    check_float32(form, (hidden, weight, None), labels, token_weights, {})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("form", FORMS)
def test_a_broken_row_breaks_the_loss_and_no_other_rows_gradient(form, bad):
    (hidden, weight, _), labels, token_weights = problem(40, 16, 150)
    labels, token_weights = labels.clamp(min=0), token_weights + 0.1
    (clean,) = gradients(linear_cross_entropy(hidden, weight, labels, token_weights, impl=form), [hidden])
    with torch.no_grad():
        hidden[21, 3] = bad
    loss = linear_cross_entropy(hidden, weight, labels, token_weights, impl=form)
    (broken,) = gradients(loss, [hidden])
    others = torch.arange(40, device=DEVICE) != 21
    assert loss.isnan()
    assert broken[21].isnan().all()
    assert torch.equal(broken[others], clean[others])


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_on_every_run(form):
    tensors, labels, token_weights = problem(45, 64, 700, dtype=torch.bfloat16)

    def run():
        loss = linear_cross_entropy(*tensors[:2], labels, token_weights, bias=tensors[2], impl=form)
        return loss, *gradients(loss, tensors)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_real_vocabularies_in_the_logits_own_memory(monkeypatch):
    # Rows of odd lengths and many turns of the loop that overwrites what it reads.
    for words in (50257, 32001):
        (hidden, weight, _), labels, _ = problem(3, 8, words, dtype=torch.bfloat16, scale=4.0)
        labels = labels.clamp(min=0)
        exact = in_float64((hidden, weight))
        truth = gradients(linear_cross_entropy_naive(*exact, labels), exact)
        ours = gradients(linear_cross_entropy(hidden, weight, labels, impl="chunked"), (hidden, weight))
        for a, t in zip(ours, truth, strict=True):
            assert (a - t).norm() < 2**-8 * t.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)])
def test_only_the_gradients_asked_for(wanted, form):
    tensors, labels, token_weights = problem(23, 7, 11)
    all_of_them = gradients(linear_cross_entropy_naive(*tensors[:2], labels, token_weights, bias=tensors[2]), tensors)
    mine = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    linear_cross_entropy(*mine[:2], labels, token_weights, bias=mine[2], impl=form).backward()
    for tensor, gradient, needed in zip(mine, all_of_them, wanted, strict=True):
        assert (tensor.grad is not None) == needed
        if needed:
            torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("form", FORMS)
def test_no_gradients_are_made_when_none_can_be_used(form, monkeypatch):
    (hidden, weight, bias), labels, token_weights = problem(37, 20, 90)
    exact = in_float64((hidden, weight, bias))
    truth = linear_cross_entropy_naive(*exact[:2], labels, token_weights, bias=exact[2], **HEAD)

    def never(*_):
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(module, "_add_gradients", never)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, token_weights, bias=bias, impl=form, **HEAD)
    detached = [t.detach() for t in (hidden, weight, bias)]
    assert torch.equal(
        linear_cross_entropy(*detached[:2], labels, token_weights, bias=detached[2], impl=form, **HEAD), loss
    )
    assert abs(loss.item() / truth.item() - 1) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_do_not_count_may_hold_anything(form):
    (hidden, weight, _), labels, token_weights = problem(29, 6, 10)
    expected = linear_cross_entropy_naive(hidden, weight, labels, token_weights)
    with torch.no_grad():
        hidden[(labels == IGNORE_INDEX) | (token_weights == 0)] = float("nan")
    loss = linear_cross_entropy(hidden, weight, labels, token_weights, impl=form)
    torch.testing.assert_close(loss, expected)
    of_hidden, of_weight = gradients(loss, (hidden, weight))
    assert of_hidden.isfinite().all()
    assert of_weight.isfinite().all()
    assert not of_hidden[labels == IGNORE_INDEX].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["all ignored", "all weights 0", "no rows"])
def test_nothing_counts(case, form):
    (hidden, weight, bias), labels, token_weights = problem(0 if case == "no rows" else 8, 4, 6)
    if case == "all ignored":
        labels, token_weights = torch.full_like(labels, IGNORE_INDEX), None
    elif case == "all weights 0":
        token_weights = torch.zeros_like(token_weights)
    loss = linear_cross_entropy(hidden, weight, labels, token_weights, bias=bias, impl=form)
    assert loss.item() == 0.0
    assert not any(g.any() for g in gradients(loss, (hidden, weight, bias)))


@pytest.mark.parametrize("form", FORMS)
def test_a_vocabulary_of_one(form):
    (hidden, weight, bias), labels, _ = problem(5, 3, 1)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, impl=form)
    assert loss.item() == 0.0
    assert not any(g.any() for g in gradients(loss, (hidden, weight, bias)))


@pytest.mark.parametrize("form", FORMS)
def test_non_contiguous_inputs(form):
    (hidden, weight, bias), labels, token_weights = problem(20, 9, 15)
    strided = torch.empty(9, 40, device=DEVICE).T[::2].copy_(hidden.detach()).requires_grad_()
    turned = weight.detach().T.contiguous().T.requires_grad_()
    sparse = torch.empty(30, device=DEVICE)[::2].copy_(bias.detach()).requires_grad_()
    assert not any(tensor.is_contiguous() for tensor in (strided, turned, sparse))
    ours = linear_cross_entropy(strided, turned, labels, token_weights, bias=sparse, impl=form)
    truth = linear_cross_entropy_naive(hidden, weight, labels, token_weights, bias=bias)
    torch.testing.assert_close(gradients(ours, (strided, turned, sparse)), gradients(truth, (hidden, weight, bias)))


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
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(low, weight, labels, token_weights)
        naive = linear_cross_entropy_naive(low, weight, labels, token_weights)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(loss, naive, rtol=1e-6, atol=0)
    assert gradients(loss, [weight])[0].dtype == torch.float32


@pytest.mark.parametrize("form", ["fused", "chunked"])
def test_triton_forms_under_autocast(form):
    # Around the backward pass too, which makes products of its own in the fused form.
    (hidden, weight, _), labels, token_weights = problem(31, 16, 50)
    expected = gradients(linear_cross_entropy(hidden, weight, labels, token_weights, impl=form), (hidden, weight))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, token_weights, impl=form)
        torch.testing.assert_close(gradients(loss, (hidden, weight)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_no_second_derivative(form):
    (hidden, weight, _), labels, _ = problem(12, 5, 9)
    loss = linear_cross_entropy(hidden, weight, labels, impl=form)
    (slope,) = torch.autograd.grad(loss.square(), [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_backward_twice_gives_the_same_gradients(form):
    (hidden, weight, _), labels, _ = problem(12, 5, 9)
    loss = linear_cross_entropy(hidden, weight, labels, impl=form)
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


def test_bad_bias_impl_and_dtype():
    (hidden, weight, bias), labels, _ = problem(8, 4, 6)
    with pytest.raises(ValueError, match=r"bias is \[V\]"):
        linear_cross_entropy(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match="'fused'"):
        linear_cross_entropy(hidden, weight, labels, impl="cuda")
    with pytest.raises(ValueError, match="one dtype"):
        linear_cross_entropy(hidden.double(), weight.double(), labels, impl="fused")
    with pytest.raises(ValueError, match="operand_dtype"):
        linear_cross_entropy(hidden, weight, labels, operand_dtype=torch.float16)


@pytest.mark.parametrize(
    ("weight", "learns", "operand", "form"),
    [
        (torch.bfloat16, True, torch.bfloat16, "fused"),
        (torch.bfloat16, False, torch.bfloat16, "chunked"),
        (torch.float32, True, torch.bfloat16, "chunked"),
        (torch.float32, True, torch.float32, "chunked"),
    ],
)
def test_which_form_suits(weight, learns, operand, form):
    hidden, words = torch.zeros(4, 64, dtype=operand), torch.zeros(9, 64, dtype=weight, requires_grad=learns)
    assert dispatch.loss_form("triton", hidden, words, operand) == form
    assert dispatch.loss_form("auto", hidden, words, operand) == "torch"  # on a CPU
