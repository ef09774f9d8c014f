"""Forward passes: how a batch is laid out, models that cannot be packed, memory that does not suffice."""

import json
import os
import random
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from lark_fast import Scorer
from lark_fast.attention import NAME
from lark_fast.batch import SEQUENCES_STEP, make_batch
from lark_fast.kernels.token_stats import IGNORE_INDEX
from lark_fast.rendering.renderer import Rendered
from lark_fast.scoring.forward import Passes
from lark_fast.student import Student
from tests.test_attention import FLOAT32, VOCABULARY, alone, assert_close, eager, one_by_one, trajectories
from tests.tiny import UNPACKABLE, tiny_decoder, tiny_llama

ROOT = Path(__file__).resolve().parents[1]
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's memory")


def sequences(lengths, seed=0, scored=0.6):
    chance = random.Random(seed)
    made = []
    for length in lengths:
        ids = [chance.randrange(1, VOCABULARY) for _ in range(length)]
        made.append((ids, [token if chance.random() < scored else IGNORE_INDEX for token in ids]))
    return made


LAYOUTS = {
    "several": sequences([5, 9, 2, 2, 7]),
    "one": sequences([6]),
    "of one token": sequences([1, 4, 1, 1], scored=1.0),
    "nothing scored": sequences([3, 8], scored=0.0),
    "all scored": sequences([3, 8, 2], scored=1.0),
    "empty ones": sequences([0, 4, 0, 3, 0]),
    "only empty ones": sequences([0, 0]),
    "none": [],
}


def expected_rows(made, place):
    """(rows, targets, ends): a scored token at position t is predicted by the row of position t - 1."""
    rows, targets, ends = [], [], [0]
    for number, (ids, labels) in enumerate(made):
        for t in range(1, len(ids)):
            if labels[t] != IGNORE_INDEX:
                rows.append(place(number, t - 1))
                targets.append(labels[t])
        ends.append(len(rows))
    return rows, targets, ends


@pytest.mark.parametrize("as_given", [list, np.array])
@pytest.mark.parametrize("fill_to", [0, 4, 64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packs_are_laid_out(name, fill_to, as_given):
    made = LAYOUTS[name]
    given = [(as_given(ids), as_given(labels)) for ids, labels in made]
    batch = make_batch(range(10, 10 + len(made)), given, packed=True, pinned=False, fill_to=fill_to)
    ids, places, bounds = [], [], [0]
    for row, _ in made:
        ids += row
        places += range(len(row))
        bounds.append(len(ids))
    n_tokens = len(ids)
    n_columns = max(1, n_tokens, fill_to)
    ids += [0] * (n_columns - n_tokens)
    places += [0] * (n_columns - n_tokens)
    inputs = batch.on(torch.device("cpu"))
    assert batch.shape == (1, n_columns) == tuple(inputs.ids.shape)
    assert (batch.n_tokens, batch.n_padded, batch.size) == (n_tokens, n_columns - n_tokens, n_columns)
    assert inputs.ids.tolist() == [ids]
    assert inputs.places.tolist() == [places]
    assert list(batch.bounds[: len(bounds)]) == bounds
    assert inputs.pack.cu_seqlens.tolist() == list(inputs.pack.bounds) == list(batch.bounds)
    assert inputs.pack.cu_seqlens.dtype == torch.int32
    assert inputs.pack.longest == max([len(row) for row, _ in made] + [n_columns - n_tokens])
    # All of the row is in some sequence, and what fills it up is in none of ours.
    assert batch.bounds[-1] == n_columns
    if fill_to:
        assert len(batch.bounds) % SEQUENCES_STEP == 0
        assert set(batch.bounds[len(bounds) :]) <= {n_columns}
    rows, targets, ends = expected_rows(made, lambda number, t: bounds[number] + t)
    assert inputs.rows.tolist() == rows
    assert inputs.targets.tolist() == targets
    assert inputs.ends.tolist() == ends
    assert batch.n_scored == len(rows)


@pytest.mark.parametrize("name", LAYOUTS)
def test_padded_batches_are_laid_out(name):
    made = LAYOUTS[name]
    batch = make_batch(range(len(made)), made, packed=False, pinned=False)
    n_columns = max([1, *(len(ids) for ids, _ in made)])
    inputs = batch.on(torch.device("cpu"))
    assert batch.shape == (len(made), n_columns)
    assert inputs.ids.tolist() == [ids + [0] * (n_columns - len(ids)) for ids, _ in made]
    assert inputs.pack is inputs.places is batch.bounds is None
    rows, targets, ends = expected_rows(made, lambda number, t: number * n_columns + t)
    assert inputs.rows.tolist() == rows
    assert inputs.targets.tolist() == targets
    assert inputs.ends.tolist() == ends
    assert batch.n_padded == len(made) * n_columns - sum(len(ids) for ids, _ in made)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "none"])
def test_every_layout_can_be_scored(name, fill):
    model, made = tiny_llama(VOCABULARY), LAYOUTS[name]
    passes = Passes(Student(model), top_k=None, impl="auto", tokens_per_batch=64, one_shape=fill)
    with passes.student.packing():
        ((_, scored),) = passes.run([passes.layout.prepare(range(len(made)), made)])
    double = eager(model)
    for (ids, labels), one in zip(made, scored, strict=True):
        if any(label != IGNORE_INDEX for label in labels[1:]):
            nll, brier = alone(double, Rendered(input_ids=ids, labels=labels, truncated=False))
            assert one.means["nll"] == pytest.approx(nll, rel=FLOAT32)
            assert one.means["brier"] == pytest.approx(brier, rel=FLOAT32)
        else:
            assert len(one.tokens.nll) == 0


# Models that are not packed


# Mamba's own float32, alone and on three tokens, is 1e-7 from float64 as a rule, 2e-6 now and then, 1e-5 once in 150.
OWN_RESOLUTION = {"mamba": 1e-5}


def assert_padded_and_right(model, tolerance=FLOAT32):
    items = trajectories()
    expected = one_by_one(model, items)
    for tokens_per_batch in (1, 70, 10_000):
        scorer = Scorer(model, tokens_per_batch=tokens_per_batch)
        with scorer.passes() as passes:
            assert not passes.layout.packed
        assert_close(scorer.score_rendered(items), expected, tolerance)
        assert_close(scorer.score_rendered(items[::-1]), expected[::-1], tolerance)


@pytest.mark.parametrize("name", UNPACKABLE)
def test_models_that_cannot_be_packed_are_scored_in_padded_batches(name):
    assert_padded_and_right(tiny_decoder(name, VOCABULARY), OWN_RESOLUTION.get(name, FLOAT32))


class Leak(nn.Module):
    """Carries something from token to token, past the attention function."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.kernel = kind, nn.Parameter(torch.tensor([0.2, -0.3, 0.4, 1.0]))

    def forward(self, hidden):
        before = nn.functional.pad(hidden, (0, 0, 3, 0))
        if self.kind == "shift":
            return hidden + 0.3 * before[:, 2:-1]
        return sum(weight * before[:, i : i + hidden.shape[1]] for i, weight in enumerate(self.kernel))


@pytest.mark.parametrize("kind", ["shift", "convolution"])
@pytest.mark.parametrize("name", ["llama", "phi3_longrope"])
def test_a_leak_past_the_attention_function_is_found(name, kind):
    # LongRoPE: rows of a padded batch are one length to the model, so its border counts there too.
    model, leak = tiny_decoder(name, VOCABULARY), Leak(kind)
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (leak(args[0]), *args[1:]))
    assert Student(model).unpackable == "its tokens see those of other sequences"
    assert_padded_and_right(model)


def test_a_window_that_only_the_mask_knows_is_found():
    # Longer than any sequence of the trial, so the trial's numbers are right.
    assert "sliding window" in Student(tiny_decoder("qwen2_moe_sliding")).unpackable
    assert "sliding window" in Student(tiny_decoder("phimoe")).unpackable


def test_dynamic_rope_leaves_trajectories_inside_its_border_as_they_are():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_llama(VOCABULARY, rope_parameters=rope, max_position_embeddings=40)
    items = trajectories()
    inside = [i for i, item in enumerate(items) if len(item.input_ids) < 40]
    assert len(inside) == len(items) - 1
    expected = one_by_one(model, [items[i] for i in inside])
    scores = Scorer(model, tokens_per_batch=10_000).score_rendered(items)
    assert_close([scores[i] for i in inside], expected, FLOAT32)


# Filled packs: one shape for compiled layers


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3_longrope", "gpt2"])
@pytest.mark.parametrize("tokens_per_batch", [70, 2000])
def test_what_fills_a_pack_up_changes_no_score(name, tokens_per_batch):
    # 2000 is more than GPT-2 has places and more than LongRoPE's border.
    model, items = tiny_decoder(name, VOCABULARY), trajectories()
    passes = Passes(Student(model), top_k=None, impl="auto", tokens_per_batch=tokens_per_batch, one_shape=True)
    made = [(item.input_ids, item.labels) for item in items]
    groups = passes.layout.plan([len(ids) for ids, _ in made])
    batches = [passes.layout.prepare(group, [made[i] for i in group]) for group in groups]
    assert {batch.shape for batch in batches} == {(1, tokens_per_batch)}
    assert len({len(batch.bounds) for batch in batches}) == 1
    means = {}
    with passes.student.packing():
        for batch, scored in passes.run(batches):
            means |= {member: one.means for member, one in zip(batch.members, scored, strict=True)}
    for i, (nll, brier) in enumerate(one_by_one(model, items)):
        assert means[i]["nll"] == pytest.approx(nll, rel=FLOAT32)
        assert means[i]["brier"] == pytest.approx(brier, rel=FLOAT32)


def test_compiled_layers_give_the_same_scores_and_are_given_back():
    model = tiny_llama(VOCABULARY, num_hidden_layers=1).train()
    items = trajectories()
    plain = Scorer(model, tokens_per_batch=100).score_rendered(items)
    scorer = Scorer(model, tokens_per_batch=100, compile=True)
    assert scorer.student.unpackable is None
    layer, own = model.model.layers[0], object()
    layer._compiled_call_impl = own  # a caller's own compilation
    graphs = counters["stats"]["unique_graphs"]
    compiled = scorer.score_rendered(items)
    assert counters["stats"]["unique_graphs"] > graphs
    assert_close(compiled, [(one.nll, one.brier) for one in plain], FLOAT32)
    assert layer._compiled_call_impl is own
    assert model.training
    assert model.config._attn_implementation == "eager"


# What is left behind


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_the_model_is_as_it_was_even_after_an_exception(name, training):
    model = tiny_decoder(name, VOCABULARY, attn_implementation="sdpa").train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scorer = Scorer(model, tokens_per_batch=50)
    calls = []

    def stop(*_):
        calls.append(model.config._attn_implementation)
        if len(calls) == 2:
            raise StoppedError

    packed = scorer.student.unpackable is None
    handle = model.get_input_embeddings().register_forward_pre_hook(stop)
    with pytest.raises(StoppedError):
        scorer.score_rendered(trajectories())
    handle.remove()
    assert calls == [NAME if packed else "sdpa"] * 2
    for _ in range(2):
        assert model.config._attn_implementation == "sdpa"
        assert model.training is training
        assert all(module.training is training for module in model.modules())
        assert "forward" not in model.get_output_embeddings().__dict__
        assert all(module._compiled_call_impl is None for module in model.modules())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert_close(scorer.score_rendered(trajectories()), one_by_one(model, trajectories()), FLOAT32)


# Memory


class TooMuch:
    """A device that holds so many tokens."""

    def __init__(self, model, most, error=torch.OutOfMemoryError, says="out of memory"):
        self.most, self.error, self.says, self.tried = most, error, says, []
        self.handle = model.get_input_embeddings().register_forward_pre_hook(self)

    def __call__(self, _, args):
        self.tried.append(args[0].numel())
        if args[0].numel() > self.most:
            raise self.error(self.says)


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize(("name", "fill"), [("llama", False), ("llama", True), ("bloom", False)])
@pytest.mark.parametrize("most", [60, 59, 9, 1])
def test_what_does_not_fit_is_halved_until_it_does(name, fill, most, ready):
    model, items = tiny_decoder(name, VOCABULARY), trajectories()
    expected = one_by_one(model, items)
    student = Student(model)
    passes = Passes(student, top_k=None, impl="auto", tokens_per_batch=1000, one_shape=fill)
    made = [(item.input_ids, item.labels) for item in items]
    # One batch of all, then each again by itself, perhaps laid out before memory was found to be short.
    groups = [list(range(len(items))), *([i] for i in range(len(items)))]
    batches = (passes.layout.prepare(group, [made[i] for i in group]) for group in groups)
    device = TooMuch(model, most)
    counts, missing = [0] * len(items), set()
    with student.packing() if passes.layout.packed else torch.no_grad():
        for batch, scored in passes.run(list(batches) if ready else batches):
            if scored is None:
                assert len(batch.members) == 1
                missing |= set(batch.members)
            for member, one in zip(batch.members, scored or (), strict=scored is not None):
                counts[member] += 1
                assert one.means["nll"] == pytest.approx(expected[member][0], rel=FLOAT32)
                assert one.means["brier"] == pytest.approx(expected[member][1], rel=FLOAT32)
    device.handle.remove()
    assert missing == {i for i, (ids, _) in enumerate(made) if len(ids) > most}
    assert counts == [0 if i in missing else 2 for i in range(len(items))]
    assert passes.work.halvings > 0
    assert passes.work.batches <= sum(counts)
    assert passes.layout.tokens_per_batch < 1000


def test_batches_come_back_in_order():
    passes = Passes(Student(tiny_llama(VOCABULARY)), top_k=None, impl="auto", tokens_per_batch=10)
    made = sequences([4, 9, 30, 5, 3], scored=1.0)
    batches = [passes.layout.prepare([i], [one]) for i, one in enumerate(made)]
    with passes.student.packing():
        assert [batch.members[0] for batch, _ in passes.run(batches)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
def test_an_error_that_is_not_memory_goes_through(error):
    model = tiny_llama(VOCABULARY)
    scorer = Scorer(model, tokens_per_batch=100)
    assert scorer.student.unpackable is None
    device = TooMuch(model, 0, error, "an illegal memory access")
    with pytest.raises(error, match="illegal"):
        scorer.score_rendered(trajectories())
    assert len(device.tried) == 1


# As cuBLAS, CUDA's runtime and Triton say it, in exceptions of their own.
@pytest.mark.parametrize("says", ["CUBLAS_STATUS_ALLOC_FAILED when calling", "CUDA error: out of memory"])
def test_memory_may_run_out_under_other_names(says):
    model = tiny_llama(VOCABULARY)
    scorer = Scorer(model, tokens_per_batch=100)
    assert scorer.student.unpackable is None
    TooMuch(model, 60, RuntimeError, says)
    assert len(scorer.score_rendered(trajectories())) == len(trajectories())


def test_the_scorer_says_which_sequence_is_too_large():
    model = tiny_llama(VOCABULARY)
    scorer = Scorer(model, tokens_per_batch=100)
    assert scorer.student.unpackable is None
    TooMuch(model, 40)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for a sequence of 60 tokens"):
        scorer.score_rendered(trajectories())


def in_fresh_process(code, timeout=120):
    """What the code prints as JSON, of a process with one thread."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | threads,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(deque(done.stdout.splitlines(), 1)[0])


PRELUDE = """
import json, random, resource
from pathlib import Path
from lark_fast.scoring.forward import Passes
from lark_fast.student import Student
from lark_fast import Scorer
from lark_fast.rendering.renderer import Rendered
from tests.tiny import tiny_llama

def mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

chance = random.Random(0)
def sequence(n, n_scored, vocabulary):
    ids = [chance.randrange(vocabulary) for _ in range(n)]
    return ids, [-100] * (n - n_scored) + ids[n - n_scored:]
"""

# A token takes 64 KiB in each of three activations: a pack of 4096 needs 768 MiB, half of it 384, the long one 1125.
LIMITED = (
    PRELUDE
    + """
student = Student(tiny_llama(101, intermediate_size=16384, num_hidden_layers=1))
made = [sequence(n, n // 2, 101) for n in [500, 400, 6000, 30, 2, 900, 700, 800, 600, 500, 300, 7]]

def run(limit):
    passes = Passes(student, top_k=None, impl="auto", tokens_per_batch=4096)
    groups = passes.layout.plan([len(ids) for ids, _ in made])
    means, missing = {}, []
    with student.packing():
        for batch, scored in passes.run([passes.layout.prepare([9], made[9:10])]):  # libraries come in here
            pass
        resource.setrlimit(resource.RLIMIT_AS, (limit(), resource.RLIM_INFINITY))
        for batch, scored in passes.run(passes.layout.prepare(group, [made[i] for i in group]) for group in groups):
            if scored is None:
                missing += batch.members
            else:
                means |= {i: [one.means["nll"], one.means["brier"]] for i, one in zip(batch.members, scored)}
    budget = passes.layout.tokens_per_batch
    return {"means": means, "missing": missing, "halvings": passes.work.halvings, "budget": budget}

limited = run(lambda: int((mib("VmSize") + 560) * 2**20))
print(json.dumps([limited, run(lambda: resource.RLIM_INFINITY)]))
"""
)


@LINUX
def test_a_cpu_whose_memory_does_not_suffice():
    limited, free = in_fresh_process(LIMITED)
    assert limited["halvings"] > 0 == free["halvings"]
    assert 1000 < limited["budget"] < 4096 == free["budget"]
    assert (limited["missing"], free["missing"]) == ([2], [])
    free["means"].pop("2")
    assert limited["means"].keys() == free["means"].keys()
    assert len(free["means"]) == 11
    for number, means in free["means"].items():
        assert limited["means"][number] == pytest.approx(means, rel=FLOAT32)


# All 65,536 tokens pass through the model; a core needs half a minute for the head on all of them, so an eighth of the
# trajectory is scored. The model is as narrow as can be: what grows with [T, V] would stand out.
LONG = (
    PRELUDE
    + """
n_tokens, n_scored, vocabulary = 65536, 8192, 151936
model = tiny_llama(vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                   num_key_value_heads=1, max_position_embeddings=n_tokens)
scorer = Scorer(model)
def score(n, n_scored):
    ids, labels = sequence(n, n_scored, vocabulary)
    item = Rendered(input_ids=ids, labels=labels, truncated=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = mib("VmRSS")
    (one,) = scorer.score_rendered([item])
    return {"extra": mib("VmHWM") - before, "n_tokens": one.n_tokens, "nll": one.nll}
score(50, 40)  # libraries come in here
print(json.dumps(score(n_tokens, n_scored)))
"""
)


@LINUX
def test_a_long_trajectory_with_a_large_vocabulary_takes_little_memory():
    told = in_fresh_process(LONG)
    assert told["n_tokens"] == 8192
    assert 1 < told["nll"] < 100
    logits_mib = 8192 * 151936 * 4 / 2**20  # 4.6 GiB, of the scored tokens alone
    assert told["extra"] < logits_mib / 32
