"""Students in FP8: what is replaced, what it costs, what is shared, and what the command says of it.

No GPU has to be here: plain torch has the same numbers, and Triton's interpreter with torch's own CPU product the same
calls.
"""

import gc
import json
import weakref
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lark_fast import fp8
from lark_fast.errors import UserError
from lark_fast.fp8 import ActivationMemo, Fp8Layers, Fp8Linear, fp8_fault
from lark_fast.kernels.fp8 import dequantised, quantise_rows
from lark_fast.scoring.agreement import Scores, agreement
from lark_fast.scoring.place import Here
from lark_fast.scoring.precision import FP8_BUDGET, whole_problems
from lark_fast.scoring.run import ScoreConfig, score_in
from lark_fast.scoring.scorer import Scorer
from lark_fast.scoring.store import ScoreStore, read_manifest
from lark_fast.student import Student, load_student
from tests.command import make_records, write_jsonl, write_student
from tests.score_rows import IDENTITY, row, table
from tests.students import SEQUENCES, our_nll
from tests.tiny import PACKABLE, tiny_decoder, tiny_llama, tiny_qwen2

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = "import math, lark_fast.flop as f; f.matmul_ceiling = lambda *_: math.nan\n"


def distance(ours, theirs):
    """Of per-token nll, norm over norm."""
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    return float((ours - theirs).norm() / theirs.norm())


def linear_layers(model):
    return [module for module in model.modules() if type(module) is nn.Linear]


class TestMemo:
    def test_a_tensor_is_brought_over_once(self):
        memo, x, y = ActivationMemo("torch"), torch.randn(2, 3, 32), torch.randn(2, 3, 32)
        first = memo.rows(x)
        assert memo.rows(x) is first
        assert memo.made == 1
        assert torch.equal(first.codes, quantise_rows(x.view(6, 32)).codes)
        assert memo.rows(y) is not first
        assert memo.rows(x) is not first
        assert memo.made == 3

    def test_one_that_was_written_to_is_brought_over_anew(self):
        memo, x = ActivationMemo("torch"), torch.randn(3, 32)
        before = memo.rows(x)
        x[1] += 1
        after = memo.rows(x)
        assert torch.equal(dequantised(after), dequantised(quantise_rows(x)))
        assert not torch.equal(before.codes.float(), after.codes.float())
        x.view(-1)[3] = 9.0  # by way of a view
        assert torch.equal(dequantised(memo.rows(x)), dequantised(quantise_rows(x)))

    def test_what_is_freed_is_forgotten(self):
        memo = ActivationMemo("torch")
        for _ in range(20):  # the next one often lies where the last one lay
            x = torch.randn(3, 32)
            codes = weakref.ref(memo.rows(x).codes)
            assert torch.equal(dequantised(memo.rows(x)), dequantised(quantise_rows(x)))
            del x
            assert codes() is None
            assert memo._rows is None
        assert memo.made == 20

    def test_an_older_one_that_is_freed_drops_nothing(self):
        memo, x, y = ActivationMemo("torch"), torch.randn(3, 32), torch.randn(3, 32)
        memo.rows(x)
        rows = memo.rows(y)
        del x
        assert memo.rows(y) is rows

    def test_tensors_that_do_not_count_their_changes(self):
        memo = ActivationMemo("torch")
        with torch.inference_mode():
            x = torch.randn(3, 32)
            memo.rows(x)
            x += 1
            assert torch.equal(dequantised(memo.rows(x)), dequantised(quantise_rows(x)))


def test_a_students_layers_and_nothing_else():
    model = tiny_llama()
    own = {id(layer) for layer in linear_layers(model)}
    student = Student(model)
    layers = Fp8Layers(student, impl="torch")
    assert layers.replaced == 7
    assert layers.share == 0.5
    assert not layers.kept
    assert len(linear_layers(model)) == 8  # the first block's and the head
    assert linear_layers(model)[:7] == linear_layers(model.model.layers[0])
    assert {id(layer) for layer in linear_layers(model)} < own
    assert student.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_the_same_numbers_as_rounding_by_hand(make):
    """Each layer: weight and input rounded row by row, everything else as it was."""
    by_hand = make()
    for layer in by_hand.model.layers.modules():
        if type(layer) is nn.Linear:
            weight = dequantised(quantise_rows(layer.weight.detach()))
            layer.forward = lambda x, w=weight, b=layer.bias: F.linear(
                dequantised(quantise_rows(x.flatten(0, -2))).view(x.shape), w, b
            )
    theirs = our_nll(Student(by_hand))
    student = Student(make())
    own = our_nll(student)
    assert Fp8Layers(student, impl="torch", blocks_kept=0).replaced == 14
    ours = our_nll(student)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert 1e-4 < distance(ours, own) < 0.1


def test_q_k_v_and_gate_up_share_what_they_read():
    student = Student(tiny_llama())
    layers = Fp8Layers(student, impl="torch", blocks_kept=0)
    memo = layers._places[0].fp8._memo
    memo.made = 0
    student.hidden(torch.arange(9).unsqueeze(0))
    assert memo.made == 2 * 4  # of two layers: before q, before o, before gate, before down
    assert memo._rows is None  # and nothing is held once it is over


@pytest.mark.parametrize("name", [name for name in PACKABLE if name != "gpt2"])
def test_decoders_of_all_kinds(name):
    student = Student(tiny_decoder(name, seed=3))
    own = our_nll(student)
    layers = Fp8Layers(student, impl="torch", blocks_kept=0, keep=True)
    ours = our_nll(student)
    assert 1e-4 < distance(ours, own) < 0.2, distance(ours, own)
    with layers.own_precision():
        for a, b in zip(our_nll(student), own, strict=True):
            assert torch.equal(a, b)


def test_what_stays():
    """Sizes that are no multiples of 16; experts in one tensor, and what sends tokens to them."""
    odd = Student(tiny_llama(intermediate_size=40))
    assert Fp8Layers(odd, impl="torch").replaced == 4
    assert [m.out_features for m in linear_layers(odd.model.model.layers[1])] == [40, 40, 32]
    assert Fp8Layers(Student(tiny_llama(num_hidden_layers=1)), impl="torch").share == 1  # of one block, that one
    experts = Student(tiny_decoder("deepseek3", n_routed_experts=16, first_k_dense_replace=0))
    layers = Fp8Layers(experts, impl="torch")
    assert 0 < layers.share < 1
    kinds = {name.rpartition(".")[2] for name, module in experts.model.named_modules() if type(module) is Fp8Linear}
    assert "gate" not in kinds
    assert "gate_proj" in kinds


def test_a_student_that_fp8_cannot_take():
    with pytest.raises(UserError, match=r"GPT2LMHeadModel has no linear layer that FP8 can take"):
        Fp8Layers(Student(tiny_decoder("gpt2")), impl="torch")


def test_a_student_that_does_more_with_a_layer_than_to_call_it():
    student = Student(tiny_llama())
    attention = student.model.model.layers[1].self_attn
    own = attention.forward

    def peeking(*args, **kwargs):
        (own_out, *rest), weight = own(*args, **kwargs), attention.o_proj.weight.float()
        return own_out + 100 * weight.mean(), *rest

    attention.forward = peeking
    with pytest.raises(UserError, match=r"cannot be scored in FP8: its hidden states are \d+% off"):
        Fp8Layers(student, impl="torch")


def test_own_precision_until_it_is_let_go():
    student = Student(tiny_llama())
    own = our_nll(student)
    weight = weakref.ref(student.model.model.layers[1].mlp.up_proj)
    layers = Fp8Layers(student, impl="torch", keep=True)
    ours = our_nll(student)
    assert layers.kept
    assert layers.held_bytes == 4 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    with layers.own_precision():
        for a, b in zip(our_nll(student), own, strict=True):
            assert torch.equal(a, b)
    layers.let_go()
    gc.collect()
    assert weight() is None
    assert layers.held_bytes == 0
    for a, b in zip(our_nll(student), ours, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="not there any more"), layers.own_precision():
        pass


def test_the_calls_of_a_gpu():
    """bfloat16, the kernel in Triton's interpreter, torch's own FP8 product: close to plain torch."""
    results = []
    for impl in ("torch", "triton"):
        student = Student(tiny_llama().bfloat16())
        Fp8Layers(student, impl=impl)
        results.append(our_nll(student, SEQUENCES[:1]))
    assert distance(*results) < 0.02


def test_company_moves_a_score_by_less_than_fp8_does():
    """A token's scale is its own; only sums in another order round otherwise, now and then by a whole step."""
    student = Student(tiny_llama())
    own = our_nll(student)
    Fp8Layers(student, impl="torch")
    together = our_nll(student, SEQUENCES)
    alone = [our_nll(student, [one])[0] for one in SEQUENCES]
    assert distance(together, alone) < 0.2 * distance(together, own)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_compiler_sees_through_it(impl):
    layer = Fp8Linear(nn.Linear(32, 48).bfloat16(), ActivationMemo(impl))
    x = torch.randn(2, 5, 32).bfloat16()
    with torch.no_grad():
        ours = torch.compile(layer, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(ours, layer(x), rtol=2e-2, atol=2e-2)


class TestDevice:
    def test_a_cpu_has_none(self):
        assert fp8_fault(torch.device("cpu")) == "a CPU has no FP8 products"
        assert fp8_fault(torch.device("cpu"), "torch") is None

    def test_what_is_tried(self, monkeypatch):
        """On a CPU the trial itself runs too."""
        monkeypatch.setattr(fp8, "TRIAL", (20, 32, 48))
        assert fp8._trial(torch.device("cpu")) is None
        monkeypatch.setattr("torch._scaled_mm", lambda a, b, **_: torch.zeros(len(a), b.shape[1]))
        assert fp8._trial(torch.device("cpu")) == "its FP8 products are 100% off"
        monkeypatch.setattr("torch._scaled_mm", lambda *_, **__: 1 / 0)
        assert "its FP8 products fail (ZeroDivisionError: division by zero)" in fp8._trial(torch.device("cpu"))

    @pytest.mark.parametrize(
        ("capability", "release", "said"),
        [
            ((8, 0), "2.13.0", "a card has none (compute capability 8.0, not 8.9)"),
            ((8, 9), "2.11.0", "FP8 products of this GPU need torch 2.12"),
            ((8, 9), "2.13.0+cu130", None),
            ((9, 0), "2.11.0", None),
        ],
    )
    def test_what_a_gpu_says_of_itself(self, monkeypatch, capability, release, said):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a card")
        monkeypatch.setattr("torch.__version__", release)
        monkeypatch.setattr(fp8, "_trial", lambda _: None)
        assert fp8_fault(torch.device("cuda")) == said


class TestScorer:
    def test_in_fp8(self):
        scorer = Scorer(tiny_llama(), precision="fp8", impl="torch")
        assert scorer.precision == "fp8"
        assert scorer.fp8.replaced == 7
        plain = Scorer(tiny_llama())
        assert plain.precision is None
        assert (scorer.n_parameters, scorer.cost) == (plain.n_parameters, plain.cost)
        assert scorer.footprint.weights < plain.footprint.weights
        ours, theirs = ([one.nll for one in each.score_tokens(SEQUENCES, SEQUENCES)] for each in (scorer, plain))
        assert 1e-4 < distance(ours, theirs) < 0.1

    def test_a_device_that_has_none_scores_as_without(self):
        with pytest.warns(UserWarning, match="precision='fp8': a CPU has no FP8 products; scored without"):
            scorer = Scorer(tiny_llama(), precision="fp8")
        assert scorer.precision is None
        assert scorer.precision_fault == "a CPU has no FP8 products"
        plain = Scorer(tiny_llama()).score_tokens(SEQUENCES, SEQUENCES)
        for ours, theirs in zip(scorer.score_tokens(SEQUENCES, SEQUENCES), plain, strict=True):
            assert torch.equal(ours.nll, theirs.nll)

    def test_no_other_precision(self):
        with pytest.raises(ValueError, match="precision='int8': fp8, or None"):
            Scorer(tiny_llama(), precision="int8")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("pool") / "pool.jsonl", make_records(15, 5))


def words(pool, student, out, *more):
    return ("score", "--pool", pool, "--student", student, "--out", out, "--device", "cpu", "--workers", 0, *more)


@contextmanager
def plain_fp8(config):
    """The student in this process, in the numbers of FP8."""
    loaded = load_student(config.student, device="cpu", dtype=config.dtype)
    yield Here(Scorer(loaded, precision=config.precision, impl="torch", keep_own=True))


class TestRun:
    def test_a_run_says_what_it_costs_and_keeps_it(self, tmp_path, pool, student, monkeypatch, capfd):
        monkeypatch.setattr("lark_fast.scoring.facts.matmul_ceiling", lambda *_: 1e12)
        asked = {"pool": (str(pool),), "student": str(student), "dtype": "float32", "workers": 0}
        config = ScoreConfig(**asked, out=str(tmp_path / "s"), precision="fp8")
        summary = score_in(plain_fp8, config)
        told = capfd.readouterr().err
        assert told.count("lark-fast: scoring in FP8: ") == 1
        for part in (" tokens/s where float32 does ", "g_hat: Spearman 0.9", "the same top 3 in "):
            assert part in told
        assert any(line.startswith("  in FP8 ") and "on a sample" in line for line in summary.lines())
        manifest = read_manifest(tmp_path / "s")
        assert manifest["identity"]["precision"] == "fp8"
        cost = manifest["precision_cost"]
        assert (cost["dtype"], cost["layers"], cost["share"]) == ("float32", 7, 0.5)
        assert cost["agreement"]["nll"]["largest_error"] > 0
        assert cost["own_tokens_per_second"] > 0 < cost["fp8_tokens_per_second"]

        # The sample is the whole pool here: the same figures from stores of both.
        score_in(plain_fp8, ScoreConfig(**asked, out=str(tmp_path / "p")))
        assert "precision" not in read_manifest(tmp_path / "p")["identity"]
        ours, theirs = (table(tmp_path / out) for out in ("s", "p"))
        assert ours["token_hash"].equals(theirs["token_hash"])
        scores = [Scores(*(rows[name].to_numpy() for name in ("nll", "brier"))) for rows in (theirs, ours)]
        assert summary.fp8.tokens == sum(theirs["n_input_tokens"].to_pylist())
        told = summary.as_json()
        assert told["fp8_same_top"] == pytest.approx(summary.fp8.agreement.same_top, rel=1e-5)
        assert told["fp8_speed"] > 0
        expected = agreement(*scores, ours["problem_id"].to_pylist(), FP8_BUDGET).as_json()
        for name in ("nll", "g_hat"):
            assert cost["agreement"][name] == pytest.approx(expected[name], rel=1e-3)
        assert cost["agreement"]["problems"] == expected["problems"] == 15

        # The same again has nothing to do, and nothing is lost; without it the directory is refused.
        capfd.readouterr()
        assert score_in(plain_fp8, config).scored == 0
        assert "scoring in FP8" not in capfd.readouterr().err
        assert read_manifest(tmp_path / "s")["precision_cost"] == cost
        with pytest.raises(UserError, match=r"precision was 'fp8', is None"):
            score_in(plain_fp8, replace(config, precision=None))

    def test_a_cost_outlives_the_run_that_measured_it(self, tmp_path):
        with ScoreStore(tmp_path, IDENTITY) as scores:
            scores.note(precision_cost={"layers": 3})
            scores.append([row(1, 0)])
        with ScoreStore(tmp_path, IDENTITY) as scores:  # stopped, and gone on with
            scores.append([row(1, 1)])
            scores.finish()
        assert read_manifest(tmp_path)["precision_cost"] == {"layers": 3}
        with ScoreStore(tmp_path, IDENTITY, overwrite=True):
            assert "precision_cost" not in read_manifest(tmp_path)

    def test_a_cpu_says_one_line_and_scores_as_without(self, tmp_path, forks, pool, student):
        done = forks.run(
            *words(pool, student, tmp_path / "s", "--precision", "fp8", "--dtype", "bfloat16"), before=QUICK
        )
        line = "lark-fast: --precision fp8: a CPU has no FP8 products; scoring in bfloat16 without it\n"
        assert done.stderr.count(line) == 1
        plain = forks.run(*words(pool, student, tmp_path / "p", "--dtype", "bfloat16"), before=QUICK)
        assert "precision" not in plain.stderr
        assert table(tmp_path / "s").equals(table(tmp_path / "p"))
        assert read_manifest(tmp_path / "s")["identity"] == read_manifest(tmp_path / "p")["identity"]
        # What was begun without it goes on with it, where it is not in force.
        again = forks.run(*words(pool, student, tmp_path / "p", "--precision", "fp8"), before=QUICK)
        assert "0 trajectories scored" in again.stdout

    def test_a_dry_run_says_it_too(self, tmp_path, forks, pool, student):
        done = forks.run(*words(pool, student, tmp_path / "s", "--precision", "fp8", "--dry-run"), before=QUICK)
        assert done.stderr.count("--precision fp8: a CPU has no FP8 products") == 1

    def test_a_member_of_a_team_falls_back(self, tmp_path, forks, pool, student):
        more = ("--precision", "fp8", "--devices", 1, "--dtype", "bfloat16")
        done = forks.run(*words(pool, student, tmp_path / "s", *more), before=QUICK)
        assert done.stderr.count("--precision fp8: a CPU has no FP8 products; scoring in bfloat16 without it") == 1
        assert "precision" not in read_manifest(tmp_path / "s")["identity"]

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--dtype", "float32"), "--precision fp8: all else is bfloat16 then; leave it or --dtype float32 away"),
            (("--dtype", "float16"), "leave it or --dtype float16 away"),
            (("--device-map", "auto"), "leave it or --device-map away"),
        ],
    )
    def test_what_it_does_not_go_with(self, tmp_path, command, pool, student, more, said):
        given = ("score", "--pool", pool, "--student", student, "--out", tmp_path / "s", "--precision", "fp8", *more)
        command.refused(given, said)

    def test_it_does_not_go_with_two_states(self, tmp_path, command, pool, student):
        given = ("score", "--pool", pool, "--before", student, "--after", student, "--out", tmp_path / "s")
        command.refused((*given, "--precision", "fp8"), "rounds off more than a few steps change")

    def test_it_does_not_go_with_ranks(self, tmp_path, forks, pool, student):
        (rank,) = forks.start_ranks([QUICK], *words(pool, student, tmp_path / "s", "--precision", "fp8"))
        told = "lark-fast: --precision fp8 is for layers that are not cut over ranks; leave it or torchrun away\n"
        assert rank.ended(2).stderr == told

    def test_a_student_that_is_quantised_already(self, tmp_path, command, pool):
        quantised = write_student(tmp_path / "q")
        config = json.loads((quantised / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        (quantised / "config.json").write_text(json.dumps(config))
        given = words(pool, quantised, tmp_path / "s", "--precision", "fp8")
        command.refused(given, f"--precision fp8: {quantised} is quantised already; leave it out")


class TestSample:
    class Item:
        def __init__(self, problem, tokens):
            self.key, self.input_ids = (problem, ""), np.zeros(tokens)

    def sample(self, sizes, problems=64, tokens=1000):
        items = [self.Item(problem, n) for problem, n in sizes]
        stream = iter(items)
        taken, chosen = whole_problems(stream, problems, tokens)
        assert taken + list(stream) == items
        assert chosen == items[: len(chosen)]
        return len(taken), len(chosen)

    def test_a_problem_that_is_cut_is_left_out(self):
        assert self.sample([("a", 400), ("a", 400), ("b", 100), ("b", 200), ("b", 1)]) == (4, 2)
        assert self.sample([("a", 1), ("a", 1), ("b", 1), ("c", 1)], problems=2) == (4, 3)

    def test_all_there_is(self):
        assert self.sample([("a", 400), ("b", 400)]) == (2, 2)
        assert self.sample([]) == (0, 0)

    def test_a_problem_that_is_too_long_alone(self):
        assert self.sample([("a", 700), ("a", 700), ("a", 700)]) == (2, 2)


def test_the_benchmark(tmp_path, pool, student):
    """Its whole path, on this device or not."""
    from benchmarks.fp8 import main

    out = tmp_path / "fp8.json"
    words = ("--student", student, "--pool", pool, "--problems", 4, "--blocks-kept", 1, 0, "--budget", 2)
    main([*map(str, words), "--tiny", "--out", str(out), "--commit", "abc"])
    record = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    kept, none_kept = record["agreement"]
    assert (kept["share_in_fp8"], none_kept["share_in_fp8"]) == (0.5, 1.0)
    assert kept["trajectories"] == none_kept["trajectories"] == 20
    assert 0 < kept["nll"]["rms_error"] < none_kept["nll"]["rms_error"] < 0.5
    (passed,) = record["passes"]
    assert passed["speedup"] == pytest.approx(passed["bfloat16_ms"] / passed["fp8_ms"])
