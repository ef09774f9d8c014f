"""Two states of a student side by side: the numbers of both models by eager float64, and a run that makes them."""

import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from lark_fast.cli.app import app
from lark_fast.errors import UserError
from lark_fast.pool.records import normalise
from lark_fast.ranks import rank_correlation, rank_correlations
from lark_fast.scoring import facts, run
from lark_fast.scoring.delta import read_delta
from lark_fast.scoring.learnability import measured_rate
from lark_fast.scoring.paired import PairedPasses, PairedScorer
from lark_fast.scoring.parts import part_files, schema_of
from lark_fast.scoring.run import ScoreConfig, students_of
from lark_fast.scoring.scorer import Scorer
from lark_fast.scoring.store import read_manifest
from lark_fast.student import Student
from lark_fast.student_files import StudentFiles, find_student
from tests.command import make_records, write_jsonl, write_student
from tests.score_rows import IDENTITY, go_on, row, table
from tests.templates import CHATML
from tests.tiny import TINY_MODELS, byte_level_tokenizer, tiny_decoder, tiny_llama

ADDED = ["nll_after", "loss_delta", "rho_measured"]
# The matrix product that is timed before every run takes longer than these; and windows of four packs.
QUICK = "import math, os, lark_fast.flop as f, lark_fast.packing as p; f.matmul_ceiling = lambda *_: math.nan\n"
SMALL_WINDOWS = QUICK + "p.CPU_WINDOW_FLOP = 0\n"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(CHATML)


def a_little_later(model):
    """Another state of it: every weight moved."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def eager_nll(model, rendered):
    """[T] of the scored tokens, from float64 logits."""
    ids = torch.tensor([rendered.input_ids])
    labels = torch.tensor(rendered.labels)[1:]
    logits = model.double()(input_ids=ids).logits[0, :-1]
    model.float()
    return F.cross_entropy(logits[labels >= 0], labels[labels >= 0], reduction="none")


class TestNumbers:
    # With a softcap; in padded batches.
    @pytest.mark.parametrize(("name", "top_k"), [("gemma2", 7), ("mamba", None)])
    def test_are_those_of_both_models(self, name, top_k, tokenizer):
        make = partial(tiny_decoder, "mamba") if name == "mamba" else TINY_MODELS[name]
        before, after = make(len(tokenizer)), a_little_later(make(len(tokenizer)))
        how = {"top_k": top_k, "tokens_per_batch": 150}
        scorer = PairedScorer(Student(before, tokenizer), Student(after, tokenizer), **how)
        rendered = [scorer.renderer(normalise(raw)) for raw in make_records(6)]
        alone = Scorer(before, tokenizer, **how).score_rendered(rendered)
        for item, one, plain in zip(rendered, scorer.score_rendered(rendered), alone, strict=True):
            was, now = eager_nll(before, item), eager_nll(after, item)
            assert one.nll == plain.nll == pytest.approx(was.mean().item(), rel=1e-5)
            assert (one.brier, one.brier_topk, one.rsr) == (plain.brier, plain.brier_topk, plain.rsr)
            assert one.nll_after == pytest.approx(now.mean().item(), rel=1e-5)
            # A difference: of the size of its terms.
            assert one.loss_delta == pytest.approx((was - now).mean().item(), abs=1e-5 * plain.nll)
            assert plain.loss_delta is plain.nll_after is None

    def test_every_token(self, tokenizer):
        before, after = tiny_llama(len(tokenizer)), a_little_later(tiny_llama(len(tokenizer)))
        scorer = PairedScorer(Student(before, tokenizer), Student(after, tokenizer))
        rendered = [scorer.renderer(normalise(raw)) for raw in make_records(3)]
        with scorer.passes() as passes:
            assert isinstance(passes, PairedPasses)
            sequences = [(item.input_ids, item.labels) for item in rendered]
            ((batch, scored),) = passes.run([passes.layout.prepare(range(len(rendered)), sequences)])
        for place, one in zip(batch.members, scored, strict=True):
            for model, nll in ((before, one.tokens.nll), (after, one.nll_after)):
                np.testing.assert_allclose(nll, eager_nll(model, rendered[place]), rtol=1e-4, atol=1e-5)
        assert not before.config._attn_implementation == after.config._attn_implementation == "lark_fast"

    def test_count_both(self, tokenizer):
        model, other = tiny_llama(len(tokenizer)), tiny_llama(len(tokenizer), num_hidden_layers=3)
        parts = [Scorer(one, tokenizer) for one in (model, other)]
        both = PairedScorer(*(Student(one, tokenizer) for one in (model, other)))
        assert both.cost.flop([9, 70], 20) == sum(part.cost.flop([9, 70], 20) for part in parts)
        assert both.footprint.weights == sum(part.footprint.weights for part in parts)
        assert both.footprint.pack(99) == max(part.footprint.pack(99) for part in parts)

    def test_what_the_memory_cannot_hold_is_halved_for_both(self, tokenizer, monkeypatch):
        before, after = tiny_llama(len(tokenizer)), a_little_later(tiny_llama(len(tokenizer)))
        scorer = PairedScorer(Student(before, tokenizer), Student(after, tokenizer))
        rendered = [scorer.renderer(normalise(raw)) for raw in make_records(6)]
        expected = scorer.score_rendered(rendered)
        stats = PairedPasses._stats

        def short(self, student, inputs, top_k):
            if student is self.after and inputs.ids.numel() > 120:
                raise MemoryError
            return stats(self, student, inputs, top_k)

        monkeypatch.setattr(PairedPasses, "_stats", short)
        for one, whole in zip(scorer.score_rendered(rendered), expected, strict=True):
            assert (one.nll, one.nll_after) == pytest.approx((whole.nll, whole.nll_after), rel=1e-6)

    def test_of_two_that_are_not_one_student(self, tokenizer):
        other = byte_level_tokenizer(CHATML, vocab_size=410)
        more = byte_level_tokenizer(CHATML)
        more.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
        places = [StudentFiles(name=name, base=Path(name), adapter=None, tokenizer=Path(name)) for name in "ab"]
        before = Student(tiny_llama(450), tokenizer, places[0])
        for model, words, message in (
            (tiny_llama(450), other, r"their tokenizers differ \(model\)"),
            (tiny_llama(450), more, r"their tokenizers differ \(added_tokens\)"),
            (tiny_llama(449), tokenizer, "their vocabularies have 450 and 449 words"),
            (tiny_llama(450, max_position_embeddings=99), tokenizer, "max_positions is 512 and 99"),
        ):
            with pytest.raises(UserError, match=f"--before a and --after b are not two states of one .*: {message}$"):
                PairedScorer(before, Student(model, words, places[1]))


class TestStore:
    IDENTITY = IDENTITY | {"after": "b"}

    def test_finishing_adds_the_rate_and_twins_share_it(self, tmp_path):
        numbers = [(2.0, 1.0), (1.0, 1.5), (0.0, 1.0), (2.0, 0.0), (3.0, 3.0), (9.0, 9.5)]
        rows = [
            row("p", c, nll=nll, tokens=b"same" if c in (0, 5) else None)
            | {"nll_after": after, "loss_delta": nll - after}
            for c, (nll, after) in enumerate(numbers)
        ]
        go_on(tmp_path, [rows[:3], rows[3:]], self.IDENTITY, steps=4)
        made = table(tmp_path)
        assert made.schema.equals(schema_of(self.IDENTITY, final=True))
        half = np.log(2) / 4
        expected = [half, -np.log(1.5) / 4, np.nan, np.nan, 0.0, half]
        np.testing.assert_allclose(made["rho_measured"].to_numpy(), expected, rtol=1e-12)
        assert made["loss_delta"].to_pylist() == [1.0, -0.5, -1.0, 2.0, 0.0, 1.0]
        assert read_manifest(tmp_path)["steps"] == 4

    def test_summed_up(self, tmp_path):
        rng = np.random.default_rng(0)
        rows = []
        for problem, size in enumerate([5, 1, 4, 2, 3]):
            for candidate in range(size):
                nll, brier, after = rng.uniform(1, 2), rng.uniform(0.1, 1), rng.uniform(1, 2)
                # One without a number in it, and a problem of twins.
                after = np.nan if (problem, candidate) == (0, 2) else after
                twin = {"tokens": b"same"} if problem == 3 else {}
                numbers = {"nll_after": after, "loss_delta": nll - after}
                rows.append(row(problem, candidate, nll, brier, **twin) | numbers)
        go_on(tmp_path, [rows[:7], rows[7:]], self.IDENTITY, steps=2)
        made, delta = table(tmp_path).to_pylist(), read_delta(tmp_path, 2)
        known = [one for one in made if np.isfinite(one["loss_delta"])]
        assert len(known) == 14
        assert delta.loss_delta == pytest.approx(np.mean([one["loss_delta"] for one in known]))
        assert delta.improved == pytest.approx(np.mean([one["loss_delta"] > 0 for one in known]))

        def spearman(rows):
            return rank_correlation(*(np.array([one[name] for one in rows]) for name in ("rho", "rho_measured")))

        within = [spearman([one for one in known if one["problem_id"] == problem]) for problem in "024"]
        assert (delta.steps, delta.problems) == (2, 3)
        assert delta.spearman == pytest.approx(spearman(known))
        assert delta.spearman_within == pytest.approx(np.mean(within))
        assert len(delta.lines()) == 2
        lower, higher = (replace(delta, loss_delta=moved).lines()[0] for moved in (0.25, -0.25))
        assert lower.endswith("; the mean of all is 0.25 nats lower")
        assert higher.endswith("; the mean of all is 0.25 nats higher")

    def test_of_nothing(self, tmp_path):
        delta = read_delta(tmp_path, 1)
        assert delta.lines() == []
        assert set(delta.as_json().values()) == {None, 0, 1}


def test_correlations_of_groups():
    one, other = np.array([1.0, 2, 3, 5, 5, 1, 4, 4, 2]), np.array([3.0, 2, 1, 1, 2, 7, 0, 1, 2])
    groups = np.array(list("abaccdabb"))
    ours = rank_correlations(one, other, groups)
    expected = [rank_correlation(one[groups == name], other[groups == name]) for name in "ab"]
    assert ours.tolist() == expected  # c has no order in `one`, d one row
    assert rank_correlations(one[:0], other[:0], groups[:0]).shape == (0,)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("pool") / "pool.jsonl", make_records(16, 4))


@pytest.fixture(scope="module")
def students(tmp_path_factory, tokenizer):
    """Two states on disk."""
    directory = tmp_path_factory.mktemp("students")
    write_student(directory / "before", tokenizer=tokenizer)
    a_little_later(tiny_llama(len(tokenizer))).save_pretrained(directory / "after")
    tokenizer.save_pretrained(directory / "after")
    return directory / "before", directory / "after"


def words(pool, students, out, *more):
    """The words of the command."""
    before, after = students
    pair = ("--before", before, "--after", after)
    return ("score", "--pool", pool, *pair, "--out", out, "--tokens-per-batch", 256, *more)


@pytest.fixture(scope="module")
def whole(forks, pool, students, tmp_path_factory):
    """The directory of a run that nothing happened to, and what it said."""
    out = tmp_path_factory.mktemp("whole") / "s"
    more = ("--per-token", "--top-k", 5, "--steps", 8, "--json")
    done = forks.run(*words(pool, students, out, *more), before=SMALL_WINDOWS)
    assert len(part_files(out)) > 2
    return out, done


class TestARun:
    def test_adds_columns_and_changes_nothing_else(self, tmp_path, forks, pool, students, whole):
        out, done = whole
        made, said = table(out), json.loads(done.stdout)
        alone = ("--student", students[0], "--dtype", "float32", "--per-token", "--top-k", 5)
        size = ("--tokens-per-batch", 256, "--json")
        plain = forks.run("score", "--pool", pool, *alone, "--out", tmp_path / "s", *size, before=SMALL_WINDOWS)
        assert made.drop_columns([*ADDED, "token_nll_after"]).equals(table(tmp_path / "s"))
        rate = measured_rate(made["nll"].to_numpy(), made["nll_after"].to_numpy(), 8)
        np.testing.assert_array_equal(made["rho_measured"].to_numpy(), rate)
        for name, tokens in (("nll", "token_nll"), ("nll_after", "token_nll_after")):
            means = [np.mean(values, dtype=np.float64) for values in made[tokens].to_pylist()]
            np.testing.assert_allclose(made[name].to_numpy(), means, rtol=1e-6)
        one = json.loads(plain.stdout)
        assert said["forward_flop"] == pytest.approx(2 * one["forward_flop"], rel=1e-5)
        assert (said["input_tokens"], said["packs"]) == (one["input_tokens"], one["packs"])
        assert said.keys() == one.keys()
        assert all(one[name] is None for name in one if name.startswith("paired_"))
        assert said["paired_loss_delta"] == pytest.approx(made["loss_delta"].to_numpy().mean(), rel=1e-5)
        assert said["paired_steps"] == 8
        assert "two are compared in float32" in done.stderr or not torch.cpu.get_capabilities().get("avx512_bf16")
        identity = read_manifest(out)["identity"]
        assert [identity[name] for name in ("student", "after")] == [
            find_student(s).fingerprint()["weights"] for s in students
        ]
        assert identity["dtype"] == "float32"

    def test_stopped_and_gone_on_in_another_process(self, tmp_path, forks, pool, students, whole):
        out = tmp_path / "s"
        arguments = words(pool, students, out, "--per-token", "--top-k", 5, "--steps", 8)
        stop = (
            "from lark_fast.scoring.forward import Passes\n"
            "launch, passes = Passes._launch, 0\n"
            "def stopping(self, batch):\n"
            "    global passes\n"
            "    passes += 1\n"
            "    passes == 7 and os.kill(os.getpid(), 9)\n"
            "    return launch(self, batch)\n"
            "Passes._launch = stopping\n"
        )
        forks.start(*arguments, before=SMALL_WINDOWS + stop).ended(-signal.SIGKILL)
        rows = sum(pq.read_metadata(part).num_rows for part in part_files(out))
        assert 0 < rows < 64
        done = forks.run(*arguments, "--devices", 1, "--device", "cpu", before=SMALL_WINDOWS)
        assert "trajectories had been scored before" in done.stdout
        assert "rho against rho_measured, Spearman: " in done.stdout
        assert table(out).equals(table(whole[0]))

    def test_another_number_of_steps_needs_no_pass(self, tmp_path, forks, pool, students, whole):
        shutil.copytree(whole[0], tmp_path / "s")
        more = ("--per-token", "--top-k", 5, "--steps", 2, "--json")
        done = json.loads(forks.run(*words(pool, students, tmp_path / "s", *more), before=QUICK).stdout)
        assert (done["scored"], done["complete"], done["paired_steps"]) == (0, True, 2)
        rates = [table(out)["rho_measured"].to_numpy() for out in (tmp_path / "s", whole[0])]
        np.testing.assert_allclose(2 * rates[0], 8 * rates[1], rtol=1e-12)

    def test_another_student_is_refused(self, forks, pool, students, whole):
        more = ("--per-token", "--top-k", 5)
        refused = forks.run(*words(pool, students[::-1], whole[0], *more), code=2, before=QUICK)
        assert "student was '" in refused.stderr
        assert "; after was '" in refused.stderr
        alone = ("score", "--pool", pool, "--student", students[0], "--out", whole[0], "--dtype", "float32")
        refused = forks.run(*alone, *more, code=2, before=QUICK)
        assert ", is None); give another directory" in refused.stderr

    def test_a_dry_run_counts_both(self, tmp_path, forks, pool, students, whole):
        done = forks.run(*words(pool, students, tmp_path / "s", "--dry-run", "--json"), before=QUICK)
        said, ran = json.loads(done.stdout), json.loads(whole[1].stdout)
        weights = sum((student / "model.safetensors").stat().st_size for student in students)
        assert said["estimated_flop"] == ran["forward_flop"]
        assert said["estimated_weights_bytes"] == pytest.approx(weights, rel=0.05)
        assert said["estimated_disk_bytes"] == (200 + 24) * 64
        assert not (tmp_path / "s").exists()

    def test_selects_what_was_learnt_fastest(self, tmp_path, forks, whole):
        out = tmp_path / "selection"
        words = ("select", "--scores", whole[0], "--out", out, "--policy", "measured", "--budget", 1)
        forks.run(*words)
        chosen = pq.read_table(out / "weights.parquet").to_pylist()
        best = {}
        for one in table(whole[0]).to_pylist():
            best[one["problem_id"]] = max(best.get(one["problem_id"], -np.inf), one["rho_measured"])
        found = {(one["problem_id"], one["candidate_id"]): one["rho_measured"] for one in table(whole[0]).to_pylist()}
        assert len(chosen) == 16
        for one in chosen:
            assert found[one["problem_id"], one["candidate_id"]] == best[one["problem_id"]]


def test_the_precision_is_told_of_a_device_that_is_elsewhere(tokenizer, monkeypatch, capsys):
    """Of a Ray cluster, whose GPUs the command's own machine need not have."""
    monkeypatch.setattr(facts, "matmul_ceiling", lambda *_: 1e12)
    here = facts.Facts.of(Scorer(tiny_llama(len(tokenizer)), tokenizer))
    run._say_in_what_precision(replace(here, device_type="cuda", multiplies_bfloat16=True))
    assert "the two are compared in float32: what a few steps change" in capsys.readouterr().err
    run._say_in_what_precision(replace(here, device_type="cuda", multiplies_bfloat16=False))
    assert capsys.readouterr().err == ""


def test_a_base_is_for_the_adapters_among_the_two(tmp_path, students):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "moved/away"}))
    whole, one, two = (str(path) for path in (students[0], tmp_path / "one", tmp_path / "two"))
    for before, after in ((whole, one), (one, whole), (one, two)):
        config = ScoreConfig(pool=(), student=before, after=after, out="s", base=str(students[1]))
        found = students_of(config)
        assert [files.name for files in found] == [before, after]
        assert [files.base for files in found] == [
            students[0] if name == whole else students[1] for name in (before, after)
        ]
    with pytest.raises(UserError, match="is no adapter"):
        students_of(ScoreConfig(pool=(), student=whole, after=str(students[1]), out="s", base=whole))


def test_steps_are_those_that_a_checkpoint_says(tmp_path, forks, pool, students):
    """Of a run that began with --before; of any other, nobody knows."""
    before, other = students
    data = write_jsonl(tmp_path / "train.jsonl", [{**record, "weight": 1.0} for record in make_records(4)])
    cheap = QUICK + "import lark_fast.training.run as r; r.matmul_ceiling = f.matmul_ceiling\n"
    training = ("train", "--data", data, "--student", before, "--out", tmp_path / "after", "--global-batch", 4)
    forks.run(*training, "--max-steps", 3, "--lr", 1e-3, "--dtype", "float32", before=cheap)
    for earlier, steps in ((before, 3), (other, 1)):
        out, pair = tmp_path / f"from {earlier.name}", (earlier, tmp_path / "after")
        done = forks.run(*words(pool, pair, out, "--limit", 12, "--json"), before=QUICK)
        assert json.loads(done.stdout)["paired_steps"] == steps
        told = f"3 steps lie between the two, as {tmp_path / 'after' / 'manifest.json'} says"
        assert (told in done.stderr) == (steps == 3)
        assert ("is not known, so rho_measured is of all of them" in done.stderr) == (steps == 1)
        made = table(out)
        rate = measured_rate(made["nll"].to_numpy(), made["nll_after"].to_numpy(), steps)
        np.testing.assert_array_equal(made["rho_measured"].to_numpy(), rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--student is missing; or give two states of one, with --before and --after"),
        (["--student", "s", "--before", "a", "--after", "b"], "--student goes alone; --before and --after"),
        (["--student", "s", "--after", "b"], "--student goes alone; --before and --after"),
        (["--before", "a"], "--after is missing: two states of a student are compared"),
        (["--after", "b"], "--before is missing: two states of a student are compared"),
        (["--student", "s", "--steps", 3], "--steps lie between --before and --after"),
        (["--before", "a", "--after", "b", "--local-steps", 2], "--local-steps takes one --student"),
    ],
)
def test_what_is_mixed_is_refused(tmp_path, options, message):
    asked = ("score", "--pool", "p", "--out", tmp_path / "s", *options)
    with pytest.raises(UserError, match=f"^{message}"):
        CliRunner().invoke(app, list(map(str, asked)), catch_exceptions=False)
