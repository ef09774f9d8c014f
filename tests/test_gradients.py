"""Gradients of single trajectories against brute force, what follows from them, and the theory where it is exact."""

import numpy as np
import pytest
import torch

from lark_fast.diagnosis.exact import cosines, cross_share, rate_gradient, relative_rate
from lark_fast.diagnosis.gradients import Gradients
from lark_fast.errors import UserError
from lark_fast.pool.records import NOT_SCORED
from lark_fast.rendering.renderer import Rendered
from lark_fast.scoring.learnability import g_hat
from lark_fast.scoring.scorer import Scorer
from lark_fast.student import Student
from tests.tiny import TINY_MODELS, tiny_decoder, tiny_llama, tiny_qwen2

LENGTHS = [(9, 3), (17, 8), (5, 2), (12, 12), (30, 11)]  # tokens, scored ones


def trajectories(lengths=LENGTHS, vocab_size=101):
    """Random token ids; two of them share their beginning, so that their gradients are alike."""
    rng = np.random.default_rng(0)
    rows = []
    for length, scored in lengths:
        ids = rng.integers(1, vocab_size, length).tolist()
        if len(rows) == 1:
            ids[:9] = rows[0].input_ids
        labels = [NOT_SCORED] * (length - scored) + ids[length - scored :]
        labels[0] = NOT_SCORED
        rows.append(Rendered(input_ids=ids, labels=labels, truncated=False))
    return rows


def loss(model, row):
    """Mean nll of the scored tokens from all logits."""
    ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)
    logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=NOT_SCORED)


def brute_force(model, parameters, rows):
    """One backward pass a trajectory, gradients side by side."""
    found = []
    for row in rows:
        parts = torch.autograd.grad(loss(model, row), parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if part is None else part for p, part in zip(parameters, parts, strict=True)]
        found.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(found)


def close(gram, gradients):
    """Each inner product to 1e-5 of the two norms."""
    expected = (gradients @ gradients.T).numpy()
    norms = np.sqrt(np.diag(expected))
    return np.abs(gram - expected) <= 1e-5 * np.outer(norms, norms)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_all_parameters_against_brute_force(name):
    # Biases, a tied head, a soft cap, scaled logits: whatever lies between parameters and loss.
    model, rows = TINY_MODELS[name](101).double(), trajectories()
    gradients = Gradients(Student(model), "all")
    gram = gradients.gram(rows[:-1], rows[-1])
    assert gradients.size == sum(p.numel() for p in model.parameters())
    assert close(gram, brute_force(model, list(model.parameters()), rows)).all()
    assert abs(cosines(gram)).max() < 1 - 1e-6


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_float32_against_brute_force_in_float64(make):
    rows, exact = trajectories(), make(101).double()
    gram = Gradients(Student(make(101)), "all").gram(rows)
    assert close(gram, brute_force(exact, list(exact.parameters()), rows)).all()


def test_models_that_cannot_be_packed():
    model, rows = tiny_decoder("bloom"), trajectories()
    assert Student(model).unpackable
    gradients = Gradients(Student(model), "all")
    assert close(gradients.gram(rows), brute_force(model, list(model.parameters()), rows)).all()
    q = np.full(len(rows), 0.2)
    before, after = gradients.losses_around_step(rows, q, lr=1e-3, steps=1, adaptive=False)
    assert before == pytest.approx(sum(float(loss(model, row).detach()) for row in rows) / 5, rel=1e-5)
    assert after < before


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_last_layer_is_the_head_alone(make):
    # Of a tied matrix, what it does as an embedding is not the head's.
    model, rows = make(101), trajectories()
    student = Student(model)
    gram = Gradients(student, "last-layer").gram(rows)
    weight = student.head.weight.detach().clone().requires_grad_(True)
    found = []
    for row in rows:
        with torch.no_grad():
            hidden = student.hidden(torch.tensor([row.input_ids]))[0, :-1]
        labels = torch.tensor(row.labels[1:])
        nll = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, ignore_index=NOT_SCORED)
        found.append(torch.autograd.grad(nll, weight)[0].flatten().double())
    assert close(gram, torch.stack(found)).all()


def test_steps_of_a_tied_head_leave_the_embedding():
    model, rows = tiny_qwen2(101), trajectories()
    gradients = Gradients(Student(model), "last-layer")
    embedding = model.get_input_embeddings().weight.detach().clone()
    seen = []
    model.model.register_forward_hook(lambda module, inputs, out: seen.append(out[0].detach().clone()))
    before, after = gradients.losses_around_step(rows[:1], [1.0], lr=1e-2, steps=2, adaptive=True)
    assert after < before
    assert len(seen) == 3
    assert all(torch.equal(hidden, seen[0]) for hidden in seen)
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_lora_adapters_as_training_begins_with():
    model, rows = tiny_llama(101), trajectories()
    gradients = Gradients(Student(model), "lora", seed=3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert gradients.size == sum(p.numel() for p in trained) < sum(p.numel() for p in model.parameters())
    assert close(gradients.gram(rows), brute_force(model, trained, rows)).all()
    again = Gradients(Student(tiny_llama(101)), "lora", seed=3)
    np.testing.assert_array_equal(again.gram(rows), gradients.gram(rows))


@pytest.mark.parametrize("held", [2, 3, 4])
def test_fewer_gradients_in_memory_give_the_same(held):
    rows = trajectories()
    gradients = Gradients(Student(tiny_llama(101)), "all")
    expected = gradients.gram(rows)
    gradients._held = held
    np.testing.assert_allclose(gradients.gram(rows), expected, rtol=1e-12)


def test_no_memory_for_gradients_is_told(monkeypatch):
    monkeypatch.setattr("lark_fast.diagnosis.gradients.available_memory", lambda device: 1 << 18)
    with pytest.raises(UserError, match="--parameters lora or last-layer"):
        Gradients(Student(tiny_llama(101)), "all")


@pytest.mark.parametrize("adaptive", [False, True])
def test_steps_against_torch_and_taken_back(adaptive):
    model, rows = tiny_llama(101), trajectories()
    gradients = Gradients(Student(model), "all")
    begun = [parameter.detach().clone() for parameter in model.parameters()]
    q = np.array([0.5, 0.0, 0.2, 0.3, 0.0])
    before, after = gradients.losses_around_step(rows, q, lr=3e-3, steps=3, adaptive=adaptive)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), begun, strict=True))

    kind = torch.optim.AdamW if adaptive else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        total = sum(weight * loss(model, row) for weight, row in zip(q, rows, strict=True))
        losses.append(float(total.detach()))
        total.backward()
        optimizer.step()
    assert before == pytest.approx(losses[0], rel=1e-5)
    assert after == pytest.approx(losses[-1], rel=1e-4)
    assert after < before


def test_a_small_step_falls_as_gradient_flow_foretells():
    rows = trajectories()
    student = Student(tiny_llama(101).double())
    gradients = Gradients(student, "all")
    gram = gradients.gram(rows)
    nll = np.array([score.nll for score in Scorer(student).score_rendered(rows)])
    for q in (np.full(5, 0.2), np.array([0.6, 0.0, 0.4, 0.0, 0.0]), np.eye(5)[3]):
        rate = relative_rate(gram, nll, q)
        lr = 1e-3 / rate
        before, after = gradients.losses_around_step(rows, q, lr=lr, steps=1, adaptive=False)
        assert -np.log(after / before) / lr == pytest.approx(rate, rel=2e-2)


def test_rate_gradient_is_the_derivative_of_the_rate():
    rng = np.random.default_rng(1)
    directions = rng.normal(size=(6, 9))
    gram, nll, q = directions @ directions.T, rng.uniform(0.1, 3, 6), rng.dirichlet(np.ones(6))
    step = 1e-6
    numeric = [
        (relative_rate(gram, nll, q + step * unit) - relative_rate(gram, nll, q - step * unit)) / (2 * step)
        for unit in np.eye(6)
    ]
    np.testing.assert_allclose(rate_gradient(gram, nll, q), numeric, rtol=1e-7)


def test_kappa_g_hat_is_the_derivative_where_the_assumptions_hold():
    """A student without layers, whose trajectories are a word each behind words with orthogonal embeddings.

    Then the head's gradient of trajectory k is (p - e_y) h_k', so |grad nll_k|^2 = |h|^2 brier_k and gradients of
    different k are orthogonal: LARK's two assumptions, exactly, with kappa = |h|^2.
    """
    size, vocab_size = 32, 101
    model = tiny_llama(vocab_size, num_hidden_layers=0, rms_norm_eps=1e-30).double()
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:size] = 3.0 * torch.eye(size, dtype=torch.float64)
        model.lm_head.weight.mul_(0.7)
    rows = [
        Rendered(input_ids=[first, word], labels=[NOT_SCORED, word], truncated=False)
        for first, word in ((3, 40), (8, 11), (20, 99), (31, 5), (1, 60))
    ]
    student = Student(model)
    scores = Scorer(student).score_rendered(rows)
    nll, brier = (np.array([getattr(score, name) for score in scores]) for name in ("nll", "brier"))

    weight = student.head.weight.detach().clone().requires_grad_(True)
    hidden = np.sqrt(size) * torch.eye(size, dtype=torch.float64)[[row.input_ids[0] for row in rows]]

    def rate(q):
        words = torch.tensor([row.input_ids[1] for row in rows])
        each = torch.nn.functional.cross_entropy(hidden @ weight.T, words, reduction="none")
        total = torch.tensor(q) @ each
        return float(torch.autograd.grad(total, weight)[0].square().sum() / total)

    uniform, step, kappa = np.full(5, 0.2), 1e-6, float(size)
    numeric = [(rate(uniform + step * unit) - rate(uniform - step * unit)) / (2 * step) for unit in np.eye(5)]
    expected = kappa * g_hat(nll, brier, np.zeros(5))
    np.testing.assert_allclose(expected, numeric, rtol=1e-6)

    gram = Gradients(student, "last-layer").gram(rows)
    np.testing.assert_allclose(gram, np.diag(kappa * brier), rtol=1e-6, atol=1e-9)  # norms are float32 in Llama
    np.testing.assert_allclose(rate_gradient(gram, nll, uniform), numeric, rtol=1e-6)
    assert abs(cross_share(gram, uniform)) < 1e-9


def test_degenerate_problems():
    assert np.isnan(relative_rate(np.eye(2), [0.0, 0.0], [0.5, 0.5]))
    assert np.isnan(rate_gradient(np.eye(2), [0.0, 0.0], [0.5, 0.5])).all()
    assert np.isnan(cross_share(np.zeros((2, 2)), [0.5, 0.5]))
    assert np.isnan(cosines([[0.0, 0.0], [0.0, 1.0]])).all()
    # Two identical candidates: half of |grad L|^2 are cross terms, and none of it is noise.
    assert cross_share(np.ones((2, 2)), [0.5, 0.5]) == pytest.approx(0.5)
