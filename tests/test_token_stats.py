"""Every form of ``token_stats`` against the float64 definition."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_fast.kernels import dispatch
from lark_fast.kernels.token_stats import (
    IGNORE_INDEX,
    token_stats,
    token_stats_from_logits,
    token_stats_from_logits_naive,
    token_stats_naive,
)
from lark_fast.kernels.token_stats_torch import CPU_BLOCK

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FIELDS = ("nll", "brier", "entropy", "brier_topk")
FORMS = dispatch.FORMS


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(T, D, V, scale=1.0, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g)
    weight = torch.randn(V, D, generator=g) * scale / math.sqrt(D)
    labels = torch.randint(0, V, (T,), generator=g)
    # Half of the labels are the most probable token: confident rows are where plain formulas cancel.
    best = (hidden @ weight.T).argmax(1)
    labels = torch.where(torch.arange(T) % 2 == 0, best, labels)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def assert_close(ours, truth, rtol=2e-5, atol=1e-6):
    for field in FIELDS:
        a, b = getattr(ours, field), getattr(truth, field)
        assert (a is None) == (b is None), field
        if b is not None:
            assert torch.equal(a.isnan(), b.isnan()), field
            torch.testing.assert_close(
                a.double(), b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, f=field: f"{f}: {m}"
            )


def assert_same_order(ours, truth):
    if truth.rank is not None:
        assert torch.equal(ours.rank, truth.rank)
    assert torch.equal(ours.agreement, truth.agreement)


def assert_same_bits(a, b):
    for field in a.__dataclass_fields__:
        one, other = getattr(a, field), getattr(b, field)
        assert (one is None and other is None) or torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0)), field


# V = 1 has no other column; 17 and 4097 leave odd remainders of a group and of a block; 9,001 is prime: three blocks.
@pytest.mark.parametrize("V", [1, 2, 17, 4097, 9001])
@pytest.mark.parametrize(("T", "D"), [(1, 8), (37, 33), (CPU_BLOCK[0] + 3, 16)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
def test_torch_form_over_shapes(T, D, V, scale):
    hidden, weight, labels = problem(T, D, V, scale)
    # float32 inputs near a tie could rank either way; integers make every product exact, so ranks must agree.
    hidden, weight = hidden.mul(4).round(), weight.mul(4).round()
    k = min(5, V)
    ours, truth = (f(hidden, weight, labels, top_k=k) for f in (token_stats, token_stats_naive))
    assert_close(ours, truth)
    assert_same_order(ours, truth)


@settings(max_examples=25, deadline=None)
@given(
    # Tiles of the interpreter are 16 x 64 x 16, so sizes around their multiples are where masks matter.
    T=st.integers(1, 40),
    D=st.integers(1, 50),
    V=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    form=st.sampled_from(["fused", "chunked"]),
    scale=st.sampled_from([0.0, 1.0, 8.0]),
    extras=st.booleans(),
    statistics=st.sets(st.sampled_from(["brier", "entropy", "rank"])),
    seed=st.integers(0, 9),
)
def test_triton_forms_over_shapes(T, D, V, dtype, form, scale, extras, statistics, seed):
    hidden, weight, labels = problem(T, D, V, scale, seed, dtype)
    hidden, weight = hidden.mul(4).round(), weight.mul(4).round()
    head = {"bias": weight[:, 0].contiguous(), "softcap": 20.0, "logit_scale": 0.5} if extras else {}
    ours = token_stats(hidden, weight, labels, statistics=statistics, impl=form, **head)
    truth = token_stats_naive(hidden, weight, labels, statistics=statistics, **head)
    # The cap's tanh rounds: ranks of near-equal logits need not agree with float64 there.
    assert_close(ours, truth, rtol=1e-4 if extras else 2e-5, atol=1e-5 if extras else 1e-6)
    if not extras:
        assert_same_order(ours, truth)


@pytest.mark.parametrize("V", [50257, 151936, 256000])
@pytest.mark.parametrize("form", FORMS)
def test_real_vocabularies(form, V, monkeypatch):
    hidden, weight, labels = problem(3, 16, V, 12.0)
    # The interpreter takes as long for a small tile as for a large one.
    monkeypatch.setattr(dispatch, "INTERPRETER_CONFIG", replace(dispatch.INTERPRETER_CONFIG, words=4096))
    assert_close(token_stats(hidden, weight, labels, impl=form), token_stats_naive(hidden, weight, labels))


@pytest.mark.parametrize("form", FORMS)
def test_confident_tokens_keep_their_digits(form):
    # p_y within 1e-4 .. 4e-9 of 1: 1 - 2p + sum p^2 and logsumexp - z_y lose every digit here in float32,
    # while float64 still has seven of them.
    gaps = torch.linspace(9, 20, 19, device=DEVICE)
    hidden = gaps.unsqueeze(1)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], device=DEVICE)
    labels = torch.zeros(19, dtype=torch.long, device=DEVICE)
    ours, truth = token_stats(hidden, weight, labels, impl=form), token_stats_naive(hidden, weight, labels)
    for field in ("nll", "brier", "entropy"):
        torch.testing.assert_close(getattr(ours, field).double(), getattr(truth, field), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_peaky_logits_up_to_200(form):
    hidden, weight, labels = problem(64, 64, 3001 if form == "torch" else 500, scale=60.0)
    assert (hidden @ weight.T).abs().max() > 150
    assert_close(
        token_stats(hidden, weight, labels, impl=form), token_stats_naive(hidden, weight, labels), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_ten_times_closer_than_eager(form, dtype):
    hidden, weight, labels = problem(128, 256, 700, 30.0, dtype=dtype)
    truth = token_stats_naive(hidden, weight, labels)
    eager = token_stats_from_logits_naive(hidden @ weight.T, labels)
    ours = token_stats(hidden, weight, labels, impl=form)
    confident = truth.nll < -math.log(0.99)
    assert confident.sum() > 20
    for field in ("nll", "brier", "entropy"):
        for some in (slice(None), confident):
            error, budget = (
                (getattr(stats, field)[some].double() - getattr(truth, field)[some]).norm() for stats in (ours, eager)
            )
            assert error * 10 < budget, field


def test_float64_inputs_stay_float64():
    hidden, weight, labels = problem(29, 31, 2111, 5.0, dtype=torch.float64)
    ours = token_stats(hidden, weight, labels, top_k=7)
    assert ours.nll.dtype == torch.float64
    assert_close(ours, token_stats_naive(hidden, weight, labels, top_k=7), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_bias_scale_softcap_and_top_k(form):
    hidden, weight, labels = problem(33, 16, 1500, 20.0)
    head = {"bias": torch.randn(1500, device=DEVICE), "softcap": 15.0, "logit_scale": 0.37}
    ours = token_stats(hidden, weight, labels, top_k=9, impl=form, **head)
    assert_close(ours, token_stats_naive(hidden, weight, labels, top_k=9, **head), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_ties_take_the_better_rank_in_every_block(form):
    # All logits equal over several blocks: rank 1 for whichever label, and the label is one of any k.
    V = 2 * CPU_BLOCK[1] + 5
    labels = torch.tensor([0, CPU_BLOCK[1], V - 1], device=DEVICE)
    hidden, weight = torch.ones(3, 4, device=DEVICE), torch.ones(V, 4, device=DEVICE)
    stats = token_stats(hidden, weight, labels, impl=form)
    assert stats.rank.tolist() == [1, 1, 1]
    assert stats.agreement.all()
    torch.testing.assert_close(stats.nll, torch.full((3,), math.log(V), device=DEVICE))
    if form == "torch":
        torch.testing.assert_close(
            token_stats(hidden, weight, labels, top_k=2).brier_topk, torch.full((3,), 0.5, device=DEVICE)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_words_with_the_labels_weights_tie_with_it(dtype):
    # Not whole numbers: only the same instructions in the same order give the same bits.
    hidden, weight, labels = problem(40, 64, 200, dtype=dtype)
    weight = torch.cat([weight, weight, weight])
    if DEVICE.type == "cpu":
        logits = hidden.float().numpy() @ weight.float().numpy().T
        if (logits[:, :200] != logits[:, 200:400]).any():
            pytest.skip("numpy, which interprets the kernel, multiplies equal columns to different last bits here")
    stats = token_stats(hidden, weight, labels + 200, impl="fused")
    assert ((stats.rank - 1) % 3 == 0).all()
    assert stats.agreement[::2].all()


@pytest.mark.parametrize("form", FORMS)
def test_ignored_rows_are_nan_and_change_nothing(form):
    hidden, weight, labels = problem(40, 8, 300)
    masked = labels.clone()
    masked[::3] = IGNORE_INDEX
    all_rows, some = (token_stats(hidden, weight, y, top_k=4, impl=form) for y in (labels, masked))
    kept = masked != IGNORE_INDEX
    for field in FIELDS:
        assert getattr(some, field)[~kept].isnan().all()
        torch.testing.assert_close(getattr(some, field)[kept], getattr(all_rows, field)[kept], rtol=1e-6, atol=1e-6)
    assert (some.rank[~kept] == 0).all()
    assert not some.agreement[~kept].any()


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_scored_where_they_lie(form):
    hidden, weight, labels = problem(50, 24, 333)
    rows = torch.tensor([7, 7, 0, 49, 21, 3], device=DEVICE)
    some = labels[:6].clone()
    some[3] = IGNORE_INDEX
    ours = token_stats(hidden, weight, some, rows=rows, top_k=5, impl=form)
    assert_close(ours, token_stats_naive(hidden[rows], weight, some, top_k=5))
    assert_same_order(ours, token_stats_naive(hidden, weight, some, rows=rows))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_broken_rows_are_reported_and_do_not_spread(form, bad):
    hidden, weight, labels = problem(12, 8, 2500 if form == "torch" else 200)
    clean = token_stats(hidden, weight, labels, top_k=3, impl=form)
    hidden[5, 2] = bad
    broken = token_stats(hidden, weight, labels, top_k=3, impl=form)
    others = torch.arange(12) != 5
    assert broken.rank[5] == 0
    assert not broken.agreement[5]
    for field in FIELDS:
        assert getattr(broken, field)[5].isnan()
        assert torch.equal(getattr(broken, field)[others], getattr(clean, field)[others])


@pytest.mark.parametrize("form", FORMS)
def test_masked_vocabulary_of_minus_infinity(form):
    # Some checkpoints mask unused words with a bias of -inf; whole blocks of them are fine, and so is nothing else.
    hidden, weight, labels = problem(6, 8, 3000)
    bias = torch.zeros(3000, device=DEVICE)
    bias[900:] = float("-inf")
    labels = labels % 900
    small = token_stats(hidden, weight[:900], labels, top_k=4, impl=form)
    masked = token_stats(hidden, weight, labels, bias=bias, top_k=4, impl=form)
    for field in FIELDS:
        torch.testing.assert_close(getattr(masked, field), getattr(small, field))
    bias[:] = float("-inf")
    bias[7] = 0.0
    alone = token_stats(hidden, weight, torch.full_like(labels, 7), bias=bias, impl=form)
    assert alone.nll.tolist() == alone.brier.tolist() == alone.entropy.tolist() == [0.0] * 6
    assert token_stats(hidden, weight, torch.full_like(labels, 8), bias=bias, impl=form).nll.isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_and_strided_operands(form):
    hidden, weight, labels = problem(20, 8, 100)
    empty = token_stats(hidden[:0], weight, labels[:0], top_k=2, impl=form)
    assert empty.nll.shape == empty.rank.shape == (0,)
    whole = token_stats(hidden, weight, labels, impl=form)
    for some, rows in (
        (hidden[::2], weight.T.contiguous().T),
        (hidden[::2].T.contiguous().T, weight.repeat(1, 2)[:, 8:]),
    ):
        strided = token_stats(some, rows, labels[::2], impl=form)
        torch.testing.assert_close(strided.nll, whole.nll[::2])


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_asked_for_is_not_there(form):
    hidden, weight, labels = problem(20, 8, 100)
    whole = token_stats(hidden, weight, labels, impl=form)
    cheap = token_stats(hidden, weight, labels, statistics=("nll", "brier"), impl=form)
    assert cheap.entropy is None
    assert cheap.rank is None
    assert torch.equal(cheap.nll, whole.nll)
    assert torch.equal(cheap.brier, whole.brier)
    assert torch.equal(cheap.agreement, whole.rank == 1)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_on_every_run(form):
    hidden, weight, labels = problem(37, 24, 300, 5.0, dtype=torch.bfloat16)
    first, second = (token_stats(hidden, weight, labels, top_k=6, impl=form) for _ in range(2))
    assert_same_bits(first, second)


@pytest.mark.parametrize("offset", [0, 1], ids=["boxes", "pointers"])
@pytest.mark.parametrize("form", ["fused", "chunked"])
def test_operands_beyond_2_to_the_31(form, offset):
    # Rows 2^30 numbers apart; only the pages that are written are ever real memory.
    hidden, weight, labels = problem(4, 64, 4, dtype=torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        far_hidden, far_weight = (
            torch.empty(3 * 2**30 + 65, dtype=torch.float16, device=DEVICE)
            .as_strided((4, 64), (2**30, 1), offset)
            .copy_(near)
            for near in (hidden, weight)
        )
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    near, far = (token_stats(h, w, labels, impl=form) for h, w in ((hidden, weight), (far_hidden, far_weight)))
    assert_same_bits(near, far)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ignored", [False, True])
def test_nothing_to_score_in_a_vocabulary_of_several_blocks(form, ignored):
    hidden, weight, labels = problem(3, 8, 9000)
    hidden, labels = (hidden, torch.full_like(labels, IGNORE_INDEX)) if ignored else (hidden[:0], labels[:0])
    stats = token_stats(hidden, weight, labels, top_k=50, impl=form)
    assert stats.brier_topk.isnan().all()
    assert len(stats.nll) == len(labels)


@pytest.mark.parametrize("form", FORMS)
def test_inside_a_training_loop(form):
    # Parameters that want gradients, hidden states that have them, and autocast to bf16 around it all.
    hidden, weight, labels = problem(20, 32, 4100 if form == "torch" else 200)
    plain = token_stats(hidden, weight, labels, top_k=5, impl=form)
    parameter = torch.nn.Parameter(weight)
    grown = hidden.clone().requires_grad_() * 1.0
    with torch.autocast(DEVICE.type, torch.bfloat16):
        trained = token_stats(grown, parameter, labels, top_k=5, impl=form)
        exact = token_stats(grown, parameter, labels, impl=form)
    assert_same_bits(plain, trained)
    assert not trained.nll.requires_grad
    torch.testing.assert_close(exact.nll, plain.nll, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_word_may_be_the_mark_of_what_is_ignored(form):
    hidden, weight, labels = problem(12, 8, 60)
    labels[::3] = 3
    rows = torch.arange(12, device=DEVICE)
    for some in (None, rows):
        stats = token_stats(hidden, weight, labels.int(), rows=some, ignore_index=3, impl=form)
        assert torch.equal(stats.nll.isnan(), labels == 3)
    impl = "torch" if form == "torch" else "triton"
    stats = token_stats_from_logits(hidden @ weight.T, labels, ignore_index=3, impl=impl)
    assert torch.equal(stats.nll.isnan(), labels == 3)


@pytest.mark.parametrize("scale", [0.0, -1.5, 2])
@pytest.mark.parametrize("form", FORMS)
def test_any_logit_scale(form, scale):
    hidden, weight, labels = problem(20, 16, 300, 2.0)
    ours, truth = (
        f(hidden, weight, labels, top_k=4, logit_scale=scale, **rest)
        for f, rest in ((token_stats, {"impl": form}), (token_stats_naive, {}))
    )
    assert_close(ours, truth, rtol=1e-4)


@pytest.mark.parametrize("softcap", [0.5, 30, 1e3, 1e6])
@pytest.mark.parametrize("form", FORMS)
def test_any_softcap(form, softcap):
    hidden, weight, labels = problem(20, 16, 300, 6.0)
    ours, truth = (
        f(hidden, weight, labels, softcap=softcap, **rest)
        for f, rest in ((token_stats, {"impl": form}), (token_stats_naive, {}))
    )
    assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_broken_word_breaks_rows_as_a_whole(form):
    hidden, weight, labels = problem(20, 8, 100)
    labels = labels.clamp(max=49)
    weight[77, 3] = float("-inf")
    stats = token_stats(hidden, weight, labels, impl=form)
    assert stats.nll[hidden[:, 3] < 0].isnan().all()  # a logit of +inf
    for field in ("brier", "entropy"):
        assert torch.equal(getattr(stats, field).isnan(), stats.nll.isnan())


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_from_logits_over_several_splits(impl):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 20000, generator=g).mul(4).to(DEVICE)
    labels = torch.tensor([0, 8191, 8192, 16383, 19999], device=DEVICE)
    ours, truth = token_stats_from_logits(logits, labels, impl=impl), token_stats_from_logits_naive(logits, labels)
    assert_close(ours, truth)
    assert_same_order(ours, truth)


@settings(max_examples=15, deadline=None)
@given(
    T=st.integers(0, 20),
    V=st.integers(1, 2500),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    impl=st.sampled_from(["triton", "torch"]),
    scale=st.sampled_from([0.0, 3.0, 200.0]),
    seed=st.integers(0, 9),
)
def test_from_logits(T, V, dtype, impl, scale, seed):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.rand(T, V, generator=g) * 2 * scale - scale).to(DEVICE, dtype)
    labels = torch.randint(0, V, (T,), generator=g).to(DEVICE)
    labels[::5] = IGNORE_INDEX
    before = logits.clone()
    k = min(7, V)
    ours = token_stats_from_logits(logits, labels, top_k=k, impl=impl)
    truth = token_stats_from_logits_naive(logits, labels, top_k=k)
    assert_close(ours, truth, rtol=1e-4, atol=2e-5)
    assert_same_order(ours, truth)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_from_logits_takes_the_logits_of_a_model_as_they_are(impl):
    # [B, L, V] of a causal model, shifted by one: rows that are not next to each other.
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 40, generator=g).to(DEVICE)
    ids = torch.randint(0, 40, (2, 9), generator=g).to(DEVICE)
    for row in range(2):
        ours = token_stats_from_logits(logits[row, :-1], ids[row, 1:], impl=impl)
        expected = torch.nn.functional.cross_entropy(logits[row, :-1], ids[row, 1:], reduction="none")
        torch.testing.assert_close(ours.nll, expected)
    columns = token_stats_from_logits(logits[0].T.contiguous().T, ids[0], impl=impl)
    torch.testing.assert_close(columns.nll, token_stats_from_logits(logits[0], ids[0], impl=impl).nll)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 4, 5)}, "expected"),
        ({"weight": torch.zeros(7, 4)}, "D differs"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, "T differs"),
        ({"labels": torch.tensor([0, 7, 1])}, "label 7"),
        ({"labels": torch.tensor([0, -1, 1])}, "label -1"),
        ({"rows": torch.tensor([0, 1])}, "rows"),
        ({"rows": torch.tensor([0, 1, 3])}, "row 3"),
        ({"top_k": 0}, "top_k=0"),
        ({"bias": torch.zeros(6)}, "bias"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"labels": torch.zeros(3, dtype=torch.uint8)}, "int64 or int32"),
        ({"hidden": torch.zeros(3, 0), "weight": torch.zeros(7, 0)}, "at least 1"),
        ({"hidden": torch.zeros(0, 5), "weight": torch.zeros(0, 5), "labels": torch.zeros(0).long()}, "at least 1"),
        ({"statistics": ("nll", "loss")}, "loss"),
        ({"statistics": "nll"}, "collection"),
        ({"impl": "cuda"}, "'fused'"),
        ({"weight": torch.zeros(7, 5, dtype=torch.float64), "impl": "fused"}, "one dtype"),
    ],
)
def test_wrong_arguments_name_the_axis(change, message):
    arguments = {"hidden": torch.zeros(3, 5), "weight": torch.zeros(7, 5), "labels": torch.zeros(3, dtype=torch.long)}
    arguments |= change
    if "row" not in message:  # a GPU's rows are nobody's to look at
        arguments = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        token_stats(**arguments)


def test_without_triton_there_is_one_warning_and_the_torch_form(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    dispatch.has_triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton is not installed") as warned:
            assert [dispatch.has_triton(), dispatch.has_triton()] == [False, False]
        assert len(warned) == 1
        with pytest.raises(ValueError, match="impl='auto' does without"):
            token_stats(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.long), impl="fused")
    finally:
        dispatch.has_triton.cache_clear()
