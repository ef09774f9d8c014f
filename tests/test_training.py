"""Training against its definition, and the equality of loss curves that the definition promises."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lark_fast.errors import UserError
from lark_fast.rendering.renderer import Renderer
from lark_fast.student import Student, load_student, load_tokenizer
from lark_fast.training import model as training_model
from lark_fast.training import step as training_step
from lark_fast.training.batches import global_batch, steps_per_epoch
from lark_fast.training.data import load_training_set
from lark_fast.training.objective import learning_rate
from lark_fast.training.run import TrainConfig
from lark_fast.training.step import Trainer
from tests.templates import CHATML
from tests.tiny import TINY_MODELS, byte_level_tokenizer, tiny_llama
from tests.training_runs import metrics, run, save_student, weighted_rows, write_data

ALL_AT_ONCE = 5  # run()'s global batch


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "train.jsonl", weighted_rows())


def differ(a, b):
    """The largest relative difference of two runs' losses, and of the gradient norms before the first step.

    Later norms drift: Adam turns rounding into steps of full size wherever a gradient is near zero.
    """
    pairs = [(x["loss"], y["loss"]) for x, y in zip(a, b, strict=True)]
    return max(abs(x / y - 1) for x, y in [*pairs, (a[0]["grad_norm"], b[0]["grad_norm"])])


def largest_difference_of_micro_batches(tmp_path, data, student, **settings):
    """Train with micro-batches of all sizes; how far do the curves lie apart?"""
    curves = []
    for size in (1, 2, 4, ALL_AT_ONCE, None):
        run(data, student, tmp_path / f"micro-{size}", micro_batch=size, **settings)
        curves.append(metrics(tmp_path / f"micro-{size}"))
    assert len(curves[0]) == 6
    return max(differ(curve, curves[-1]) for curve in curves)


@pytest.mark.parametrize("loss_norm", ["trajectory", "token"])
def test_the_loss_curve_does_not_depend_on_the_micro_batch(tmp_path, data, student, loss_norm):
    assert largest_difference_of_micro_batches(tmp_path, data, student, loss_norm=loss_norm) < 1e-5


def test_a_divisor_of_the_micro_batch_s_own_would_be_noticed(tmp_path, data, student, monkeypatch):
    # LARK's released trainer divides by the weights of the micro-batch, then by the number of micro-batches. At
    # micro-batch 1 every weight cancels: if the test above could pass with that, it would be worth nothing.
    def released_rule(weights, n_scored, *, batch_size, mean, loss_norm):
        micro_batches = batch_size / len(weights)
        return weights / (weights @ n_scored) / micro_batches

    monkeypatch.setattr(training_step, "token_weights", released_rule)
    assert largest_difference_of_micro_batches(tmp_path, data, student) > 0.01


def trainer(model, rows, tmp_path, **settings):
    """A Trainer on a model in memory, and its data."""
    tokenizer = load_tokenizer(str(save_student(tmp_path / "words")))
    data = load_training_set(str(write_data(tmp_path / "rows.jsonl", rows)), Renderer(tokenizer))
    config = TrainConfig(data="", student="", out="", **settings)
    return Trainer(Student(model), data, config, bfloat16=False), data


def plain_step(model, data, rows, loss_norm):
    """The step's objective from its definition: one trajectory at a time, the model's own logits, autograd."""
    total = 0.0
    for row in rows:
        span = slice(data.starts[row], data.starts[row + 1])
        ids, scored = torch.from_numpy(data.ids[span]).long(), torch.from_numpy(data.scored[span])
        logits = model(input_ids=ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[scored[1:]]
        total = total + data.weights[row] * (nll.mean() if loss_norm == "trajectory" else nll.sum())
    share = data.weights if loss_norm == "trajectory" else data.weights * data.n_scored
    return total / (len(rows) * share.mean()), total / share[rows].sum()


def token_rows():
    """Token ids with gaps in what is scored, as conversations of several turns have."""
    rng = np.random.default_rng(1)
    for length, weight in ((9, 0.1), (30, 1.0), (17, 3.0)):
        ids = rng.integers(0, 400, length).tolist()
        yield {"input_ids": ids, "labels": [t if i % 5 > 2 else -100 for i, t in enumerate(ids)], "weight": weight}


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("loss_norm", ["trajectory", "token"])
def test_a_step_is_its_definition(tmp_path, name, loss_norm):
    # Step 2 is the last of its epoch: 3 rows where the others have 6. The heads differ in tying, bias, cap and scale.
    model = TINY_MODELS[name]()
    rows = [*weighted_rows(4), *token_rows()]
    ours, data = trainer(model, rows, tmp_path, global_batch=6, micro_batch=2, loss_norm=loss_norm, clip=0.0)
    measured = ours.measure(2)
    gradients = [p.grad.clone() for p in model.parameters()]
    assert len(measured.rows) == 3
    model.zero_grad()
    step, logged = plain_step(model, data, measured.rows, loss_norm)
    step.backward()
    assert measured.loss == pytest.approx(logged.item(), rel=1e-5)
    assert measured.tokens == data.lengths[measured.rows].sum()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert measured.grad_norm == pytest.approx(norm, rel=1e-4)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert (gradient - parameter.grad).norm() < 1e-4 * norm


def test_held_out_loss_is_the_plain_mean(tmp_path):
    model = tiny_llama()
    ours, data = trainer(model, weighted_rows(2), tmp_path)
    everything = range(len(data))
    unweighted = replace(data, weights=np.ones(len(data)))
    with torch.no_grad():
        expected, _ = plain_step(model, unweighted, everything, "trajectory")
    assert ours.evaluate(data) == pytest.approx(expected.item(), rel=1e-5)


def test_only_scored_rows_reach_the_head(tmp_path, monkeypatch):
    seen = []

    def spy(hidden, *arguments, **options):
        seen.append(len(hidden))
        return real(hidden, *arguments, **options)

    real = training_model.linear_cross_entropy
    monkeypatch.setattr(training_model, "linear_cross_entropy", spy)
    ours, data = trainer(tiny_llama(), weighted_rows(3), tmp_path, global_batch=9, micro_batch=4)
    ours.measure(0)
    assert len(seen) == 3
    assert sum(seen) == data.n_scored.sum()


def test_weights_times_ten_change_nothing(tmp_path, data, student):
    ten = [{**row, "weight": 10 * row["weight"]} for row in weighted_rows()]
    run(data, student, tmp_path / "a")
    run(write_data(tmp_path / "ten.jsonl", ten), student, tmp_path / "b")
    assert differ(metrics(tmp_path / "a"), metrics(tmp_path / "b")) < 1e-5


def test_rows_of_weight_zero_change_nothing(tmp_path, data, student):
    # They are dropped before they are rendered, so that one of them may even be too short to train on.
    rows = weighted_rows()
    empty = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "weight": 0}
    more = [{**rows[3], "weight": 0.0}, *rows[:5], empty, *rows[5:], {**rows[0], "weight": 0}]
    plain = run(data, student, tmp_path / "a")
    mixed = run(write_data(tmp_path / "more.jsonl", more), student, tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert (plain.dropped, mixed.dropped) == (0, 3)
    assert plain.trajectories == mixed.trajectories == 12


def test_where_a_weight_may_stand(tmp_path):
    row = weighted_rows(1)[0]
    bare = {name: value for name, value in row.items() if name != "weight"}
    rows = [{**bare, "meta": {"train_weight": 0.25}}, {**bare, "weight": 3, "meta": {"train_weight": 0.25}}]
    _, data = trainer(tiny_llama(), rows, tmp_path)
    assert data.weights.tolist() == [0.25, 3.0]
    _, data = trainer(tiny_llama(), [bare, bare], tmp_path)
    assert data.weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("without", [0, 2])
def test_a_weight_that_is_missing_is_no_weight_of_one(tmp_path, student, without):
    rows = weighted_rows(1)
    del rows[without]["weight"]
    data = write_data(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError, match=rf"train.jsonl:{without + 1}: this row has no weight where others have one"):
        run(data, student, tmp_path / "out")


BAD_ROWS = {
    '"weight": NaN': "weight is null, NaN or infinite",
    '"weight": Infinity': "weight is null, NaN or infinite",
    '"weight": null': "weight is null",
    '"weight": -0.5': "weight is -0.5",
    '"weight": "1.0"': "weight is '1.0', not a number",
    '"weight": true': "weight is True, not a number",
    f'"weight": {10**400}': "weight is inf",
    '"weight": 1e300': "weight is 1e+300; it must be 0, which leaves the row out, or lie between 1e-15 and 1e+15",
    '"weight": 1e-60': "weight is 1e-60",
    '"meta": {"train_weight": "many"}': "meta.train_weight is 'many'",
    '"messages": []': "messages is empty",
    '"messages": [{"role": "user", "content": "x"}]': "no assistant turn",
    '"input_ids": [1, 2], "labels": [1], "messages": null': "input_ids has 2 entries",
    '"input_ids": [1, 9999, 3], "labels": [-100, 9999, 3], "messages": null': "outside the student's vocabulary",
    "broken": "invalid JSON",
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, student, fault):
    good = json.dumps(weighted_rows(1)[0])
    bad = good[:-1].replace('"weight"', '"was"') + f", {fault}}}"
    data = tmp_path / "train.jsonl"
    data.write_text(f"{good}\n{good}\n{bad}\n{good}\n")
    with pytest.raises(UserError) as caught:
        run(data, student, tmp_path / "out")
    assert f"{data}:3: " in str(caught.value)
    assert BAD_ROWS[fault] in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_nothing_to_train_on(tmp_path, student):
    rows = [{**row, "weight": 0} for row in weighted_rows(1)]
    with pytest.raises(UserError, match=r"no trajectory to train on \(3 rows have weight 0\)"):
        run(write_data(tmp_path / "zeros.jsonl", rows), student, tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    # One token's embedding is NaN, and only line 2 has that token.
    model = tiny_llama()
    rows = list(token_rows())
    for row in rows:
        row["input_ids"][0] = 17
    rows[1]["input_ids"][0] = 399
    rows = [{**row, "labels": [-100, *row["labels"][1:]]} for row in rows]
    for row in (rows[0], rows[2]):
        row["input_ids"] = [min(t, 398) for t in row["input_ids"]]
        row["labels"] = [min(t, 398) for t in row["labels"]]
    with torch.no_grad():
        model.get_input_embeddings().weight[399] = float("nan")
    student = save_student(tmp_path / "student", model)
    data = write_data(tmp_path / "train.jsonl", rows)
    order = [int(global_batch(step, 3, 1, 0)[0]) for step in range(3)]
    with pytest.raises(UserError) as caught:
        run(data, student, tmp_path / "out", global_batch=1, epochs=1)
    assert f"step {order.index(1) + 1}: the loss is nan" in str(caught.value)
    assert f"{data} lines 2" in str(caught.value)
    assert len(metrics(tmp_path / "out")) == order.index(1)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, data):
    # Embeddings near the smallest float32: the norm over them is fine, its derivative is not, and the loss is finite.
    model = tiny_llama(rms_norm_eps=0.0)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3e-19)
    student = save_student(tmp_path / "student", model)
    with pytest.raises(UserError, match=r"step 1: the loss is \d.*gradient norm (inf|nan).*lines"):
        run(data, student, tmp_path / "out")


def test_an_epoch_takes_every_row_once(tmp_path):
    per_epoch = steps_per_epoch(11, 4)
    epochs = [[global_batch(e * per_epoch + s, 11, 4, seed=3) for s in range(per_epoch)] for e in range(3)]
    assert [len(rows) for rows in epochs[0]] == [4, 4, 3]
    orders = [np.concatenate(epoch).tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert orders[0] != orders[1]
    assert global_batch(0, 11, 4, seed=4).tolist() != epochs[0][0].tolist()


def test_gradient_checkpointing_changes_nothing(tmp_path, data, student):
    run(data, student, tmp_path / "a")
    run(data, student, tmp_path / "b", gradient_checkpointing=True)
    assert differ(metrics(tmp_path / "a"), metrics(tmp_path / "b")) < 1e-5


@pytest.mark.parametrize("asked", [False, True])
def test_gradient_checkpointing_computes_the_layers_again(tmp_path, asked):
    model = tiny_llama()
    ours, _ = trainer(model, weighted_rows(1), tmp_path, micro_batch=3, gradient_checkpointing=asked)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    ours.measure(0)
    assert len(calls) == 1 + asked


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_an_update_is_adamw(tmp_path, clip):
    # Two steps by the textbook in float64, on the gradients that are there. Phi has biases in its matrices' layers and
    # its norms: neither decays.
    model, decay, beta = TINY_MODELS["phi"](), 0.1, (0.9, 0.95)
    ours, _ = trainer(
        model,
        weighted_rows(8),
        tmp_path,
        global_batch=6,
        epochs=10,
        lr=1e-2,
        warmup_ratio=0.1,
        weight_decay=decay,
        clip=clip,
        betas=beta,
    )
    names = dict(model.named_parameters())
    expected = {name: p.detach().double() for name, p in names.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    for step in range(2):
        lr = learning_rate(step, 40, 1e-2, 0.1)
        norm = ours.measure(step).grad_norm
        clipped = torch.stack([p.grad.norm() for p in names.values()]).norm().item()
        assert norm > 0.5
        assert clipped == pytest.approx(clip or norm, rel=1e-4)
        for name, p in names.items():
            g = p.grad.double()
            m[name], v[name] = beta[0] * m[name] + (1 - beta[0]) * g, beta[1] * v[name] + (1 - beta[1]) * g**2
            moved = m[name] / (1 - beta[0] ** (step + 1)) / ((v[name] / (1 - beta[1] ** (step + 1))).sqrt() + 1e-8)
            decayed = name.endswith("weight") and "norm" not in name
            expected[name] -= lr * (moved + decay * decayed * expected[name])
        ours.update(step)
        for name, p in names.items():
            torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_bfloat16_is_autocast_over_float32_weights(tmp_path, data):
    # bf16 keeps 8 bits: losses within 1 %, while a rate of 1e-6 would not move weights that were bf16 themselves, as
    # these are before the first step.
    vocabulary = len(byte_level_tokenizer(CHATML))
    student = save_student(tmp_path / "student", tiny_llama(vocabulary).bfloat16())
    run(data, student, tmp_path / "a", lr=1e-6)
    run(data, student, tmp_path / "b", lr=1e-6, dtype="bfloat16")
    pairs = zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True)
    losses = [(a["loss"], b["loss"]) for a, b in pairs]
    assert all(abs(a / b - 1) < 0.01 for a, b in losses)
    assert all(a != b for a, b in losses)
    before, after = (load_student(str(path), device="cpu", dtype="float32").model for path in (student, tmp_path / "b"))
    moved = [(p != q).float().mean() for p, q in zip(before.parameters(), after.parameters(), strict=True)]
    assert torch.stack(moved).median() > 0.9  # not of all: few words of the vocabulary are there


def test_dropout_draws_anew_in_every_step_and_alike_when_repeated(tmp_path):
    model = tiny_llama(attention_dropout=0.5)
    ours, _ = trainer(model, weighted_rows(1), tmp_path, global_batch=3)
    first, second, again = (ours.measure(step).loss for step in (0, 1, 0))
    assert first == again
    assert abs(first / second - 1) > 1e-4


@pytest.mark.parametrize("has_it", [False, True])
def test_auto_takes_bfloat16_where_the_processor_has_it(tmp_path, data, student, monkeypatch, has_it):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_it})
    run(data, student, tmp_path / "out", epochs=1, dtype="auto")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["identity"]["dtype"] == ("bfloat16" if has_it else "float32")


def test_the_callers_random_numbers_are_left_alone(tmp_path, data, student):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(data, student, tmp_path / "out", epochs=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("global_batch", 0),
        ("micro_batch", 0),
        ("warmup_ratio", 1.5),
        ("loss_norm", "batch"),
        ("dtype", "float16"),
        ("clip", -1.0),
        ("weight_decay", float("inf")),
        ("seed", -1),
        ("betas", (0.9, 1.0)),
    ],
)
def test_config_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(data="d", student="s", out="o", **{name: value})
