"""What a training run can be asked for beyond plain AdamW on all weights, each driven for real."""

import errno
import json
import os
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lark_fast import Scorer
from lark_fast.errors import UserError
from lark_fast.rendering.renderer import Renderer
from lark_fast.scoring.run import ScoreConfig, score_pool
from lark_fast.selection.run import SelectConfig, select
from lark_fast.student import Student, load_student
from lark_fast.training import run as training_run
from lark_fast.training.batches import micro_batches, of_rank
from lark_fast.training.config import PRESETS, LoraOptions, TrainConfig
from lark_fast.training.data import load_training_set
from lark_fast.training.guards import Guard
from lark_fast.training.optimizers import StochasticAdamW, round_stochastically
from lark_fast.training.state import RunDirectory
from lark_fast.training.step import Trainer
from tests import command
from tests.templates import CHATML
from tests.tiny import byte_level_tokenizer, tiny_llama, tiny_qwen2
from tests.training_runs import metrics, run, save_student, weighted_rows, write_data

LORA = LoraOptions(rank=4, alpha=8, dropout=0.1)
STEPS = {"epochs": 8, "global_batch": 2, "lr": 1e-3}  # 48


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "train.jsonl", weighted_rows())


def losses(out):
    return [line["loss"] for line in metrics(out) if "loss" in line]


def tensors(file):
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict


class DiedError(Exception):
    """Nobody catches it, so that nothing is saved: as after kill -9."""


def run_until(steps, *arguments, how=KeyboardInterrupt, **settings):
    """A run with a Ctrl-C in the middle of a step."""

    def measure(self, step):
        if step == steps:
            raise how
        return real(self, step)

    real = Trainer.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "measure", measure)
        with pytest.raises(how):
            run(*arguments, **settings)


# Packs


@pytest.mark.parametrize(
    "settings", [{"packing": False}, {"tokens_per_batch": 90}, {"micro_batch": 1}, {"compile": True}]
)
def test_the_curve_is_the_same_however_a_batch_is_cut(tmp_path, data, student, settings):
    # Global batches of 8: in one pack; padded; in packs of two or so; in 8 passes; and in compiled layers.
    run(data, student, tmp_path / "a", global_batch=8)
    run(data, student, tmp_path / "b", global_batch=8, **settings)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)


def test_packs_are_what_is_trained_on(tmp_path, data, student, monkeypatch):
    shapes = []
    real = Student.hidden

    def hidden(self, input_ids, *rest):
        shapes.append((tuple(input_ids.shape), bool(rest and rest[0] is not None)))
        return real(self, input_ids, *rest)

    monkeypatch.setattr(Student, "hidden", hidden)
    run(data, student, tmp_path / "a", epochs=1, global_batch=12)
    assert {(shape[0], packed) for shape, packed in shapes if packed} == {(1, True)}
    shapes.clear()
    run(data, student, tmp_path / "b", epochs=1, global_batch=12, packing=False, micro_batch=4)
    assert [shape[0] for shape, packed in shapes if not packed and shape[0] > 1] == [4, 4, 4]


def test_a_student_that_cannot_be_packed_is_padded(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(Student, "unpackable", "its tokens see those of other sequences")
    student = save_student(tmp_path / "student")
    run(data, student, tmp_path / "out", epochs=1)
    assert "padded, not packed: its tokens see those of other sequences" in capsys.readouterr().err


def test_trajectories_of_a_pack_do_not_see_each_other(tmp_path, student):
    # The gradient of a trajectory that alone has weight is the same whatever lies beside it.
    rows = weighted_rows()
    heavy = {**rows[4], "weight": 1.0}

    def gradient(others):
        tokens = [heavy, *({**row, "weight": 1e-12} for row in others)]
        run(write_data(tmp_path / "rows.jsonl", tokens), student, tmp_path / str(len(os.listdir(tmp_path))), **once)
        return seen.pop()

    seen, once = [], {"epochs": 1, "global_batch": 3, "tokens_per_batch": 10_000, "clip": 0.0}
    real = Trainer.measure

    def measure(self, step):
        measured = real(self, step)
        seen.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]) * (1 / 3))
        return measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "measure", measure)
        a, b = gradient(rows[:2]), gradient(rows[7:9])
    assert (a - b).norm() < 1e-5 * a.norm()


def test_ranks_share_the_work():
    lengths = np.random.default_rng(0).integers(5, 400, 64)
    rows = np.arange(64)
    parts = micro_batches(rows, lengths, size=None, tokens=1024, packed=True, ranks=8)
    shares = [of_rank(parts, lengths, rank, 8) for rank in range(8)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(np.concatenate([part for share in shares for part in share]).tolist()) == list(range(64))
    tokens = [sum(int(lengths[part].sum()) for part in share) for share in shares]
    assert max(tokens) < 1.5 * sum(tokens) / 8
    # A batch that would fit one pass is spread nevertheless.
    assert len(micro_batches(rows, lengths, size=None, tokens=1 << 20, packed=True, ranks=8)) >= 8


def test_lengths_on_two_sides_of_a_border_share_no_pass():
    lengths = np.array([5, 50, 6, 60, 7])
    for packed, size in ((True, None), (False, None), (True, 4)):
        parts = micro_batches(np.arange(5), lengths, size=size, tokens=1000, packed=packed, border=20)
        assert [sorted(part.tolist()) for part in parts] == [[1, 3], [0, 2, 4]]


# Adapters


@pytest.mark.parametrize("merge", [False, True])
def test_adapters(tmp_path, data, student, merge):
    from peft import PeftModel

    out = tmp_path / "out"
    options = LoraOptions(rank=4, alpha=8, dropout=0.0, merge=merge)
    summary = run(data, student, out, lora=options, eval_data=str(data), epochs=6, lr=1e-2)
    assert summary.eval_losses[-1] < summary.eval_losses[0] - 0.5
    base = AutoModelForCausalLM.from_pretrained(student)
    if merge:
        assert not list(out.glob("adapter_*"))
        model = AutoModelForCausalLM.from_pretrained(out)
        assert tensors(out / "model.safetensors").keys() == tensors(student / "model.safetensors").keys()
        held_out = Scorer.from_pretrained(str(out), device="cpu", dtype="float32").score(weighted_rows())
        assert np.mean([score.nll for score in held_out]) == pytest.approx(summary.eval_losses[-1], rel=1e-4)
    else:
        assert not (out / "model.safetensors").exists()
        assert all("lora_" in name for name in tensors(out / "adapter_model.safetensors"))
        model = PeftModel.from_pretrained(base, out)
        # What the loop measured is what the files say.
        held_out = Scorer(model.merge_and_unload(), AutoTokenizer.from_pretrained(out)).score(weighted_rows())
        assert np.mean([score.nll for score in held_out]) == pytest.approx(summary.eval_losses[-1], rel=1e-4)
    ids = AutoTokenizer.from_pretrained(out)("What is", return_tensors="pt").input_ids
    written = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert written.shape == (1, ids.shape[1] + 4)


def test_adapters_leave_the_student_alone_and_skip_the_head(tmp_path, data, student):
    run(data, student, tmp_path / "out", lora=LORA)
    names = tensors(tmp_path / "out" / "adapter_model.safetensors")
    assert not any("lm_head" in name for name in names)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(student)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": LORA},
        {"lora": LORA, "dtype": "bfloat16"},
        {"stochastic_rounding": True, "dtype": "bfloat16"},
        {"optimizer": "adamw8bit"},
        {"gradient_checkpointing": True},
        {"packing": False},
    ],
    ids=str,
)
def test_stopped_runs_go_on_bit_for_bit(tmp_path, data, student, settings):
    run(data, student, tmp_path / "whole", **STEPS, **settings)
    run_until(19, data, student, tmp_path / "parts", **STEPS, **settings)
    assert run(data, student, tmp_path / "parts", **STEPS, **settings).resumed_from == 19
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    name = "adapter_model.safetensors" if "lora" in settings else "model.safetensors"
    whole, parts = (tensors(tmp_path / out / name) for out in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": LoraOptions(targets=("nothing",))}, "--lora-target nothing: "),
        ({"lora": LoraOptions(targets=("lm_head",))}, "--lora-target lm_head: the output embedding carries"),
        ({"trackers": ("tensorboard",)}, r"--track tensorboard needs it: pip install 'lark-fast\[tensorboard\]'"),
        ({"lora": LORA}, r"--lora needs peft: pip install 'lark-fast\[lora\]'"),
        ({"optimizer": "adamw8bit"}, r"needs bitsandbytes: pip install 'lark-fast\[optim\]'"),
    ],
    ids=["target", "head", "tensorboard", "peft", "bitsandbytes"],
)
def test_what_cannot_be_had_is_said(tmp_path, data, student, monkeypatch, settings, message):
    if "pip install" in message:
        for module in ("peft", "bitsandbytes.optim", "torch.utils.tensorboard"):
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message):
        run(data, student, tmp_path / "out", **settings)


# Precision


def test_stochastic_rounding_keeps_the_mean():
    torch.manual_seed(0)
    spacing = 2.0**-7  # of bfloat16 in [1, 2)
    for value in (1 + spacing / 4, -(1 + spacing / 4)):
        drawn = round_stochastically(torch.full((100_000,), value)).double()
        assert set((drawn.abs().unique() - 1).tolist()) == {0.0, spacing}
        assert drawn.mean().item() == pytest.approx(value, abs=5 * spacing * (3 / 16 / 100_000) ** 0.5)
    special = torch.tensor([0.0, 1.5, -2.0, float("inf"), float("-inf"), float("nan")])
    assert torch.equal(round_stochastically(special).float().nan_to_num(7.0), special.nan_to_num(7.0))


def test_small_steps_move_bfloat16_weights_in_the_mean():
    # A step of 1e-4 is a 78th of bfloat16's spacing at 1: rounded to the nearest it would never move.
    parameter = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([parameter], lr=1e-4)
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert 1 - parameter.double().mean().item() == pytest.approx(20 * 1e-4, rel=0.05)


def test_stochastic_adamw_is_adamw_in_float32():
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 5), torch.randn(6, 8, 5)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = StochasticAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_without_master_weights_the_model_is_bfloat16(tmp_path, data):
    vocabulary = len(byte_level_tokenizer(CHATML))
    student = save_student(tmp_path / "student", tiny_qwen2(vocabulary), dtype=torch.bfloat16)
    run(data, student, tmp_path / "a", dtype="bfloat16", **STEPS)
    run(data, student, tmp_path / "b", dtype="bfloat16", stochastic_rounding=True, **STEPS)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=0.05)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{"lora": LORA}, {"stochastic_rounding": True}], ids=str)
def test_weights_alone_are_bfloat16(tmp_path, data, student, monkeypatch, settings):
    # Rounded frequencies would turn the positions of long trajectories by radians.
    seen = []
    real = Trainer.__init__

    def keep(self, student, *arguments, **options):
        real(self, student, *arguments, **options)
        seen.append({name: buffer.clone() for name, buffer in student.model.named_buffers()})
        seen.append({p.dtype for name, p in student.model.named_parameters() if "lora_" not in name})

    monkeypatch.setattr(Trainer, "__init__", keep)
    run(data, student, tmp_path / "out", epochs=1, dtype="bfloat16", **settings)
    fresh = dict(AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).named_buffers())
    own, dtypes = seen
    assert own.keys() == fresh.keys()
    assert all(torch.equal(own[name], fresh[name]) and own[name].dtype == fresh[name].dtype for name in own)
    assert dtypes == {torch.bfloat16}


def test_stochastic_rounding_wants_bfloat16(tmp_path, data, student, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    with pytest.raises(UserError, match="give --dtype bfloat16"):
        run(data, student, tmp_path / "out", dtype="auto", stochastic_rounding=True)


# Guards


def test_a_loss_that_jumps_stops_the_run_and_loses_nothing(tmp_path, data, student, monkeypatch):
    real = Trainer.measure

    def measure(self, step):
        measured = real(self, step)
        return type(measured)(measured.rows, measured.loss + 20 * (step == 17), *measured_rest(measured))

    def measured_rest(measured):
        return measured.grad_norm, measured.tokens, measured.scored

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "measure", measure)
        with pytest.raises(
            UserError, match=r"step 18: the loss jumps to \d.*training stops before it.*train.jsonl lines"
        ):
            run(data, student, tmp_path / "out", save_every=5, **STEPS)
        # Who wants to go on says so, and goes on where it stopped.
        assert run(data, student, tmp_path / "out", save_every=5, max_loss_jump=0.0, **STEPS).resumed_from == 17


def test_a_failure_at_the_end_costs_no_step(tmp_path, data, student, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "write_checkpoint", full)
        with pytest.raises(UserError, match="cannot be written to: No space left on device"):
            run(data, student, tmp_path / "out", **STEPS)
    assert run(data, student, tmp_path / "out", **STEPS).resumed_from == 48
    run(data, student, tmp_path / "whole", **STEPS)
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")


def test_parameters_that_never_move_are_no_obstacle(tmp_path, student):
    def trainer():
        loaded = load_student(str(student), device="cpu", dtype="float32")
        loaded.model.unused = torch.nn.Parameter(torch.ones(3))
        data = load_training_set(str(rows), Renderer(loaded.tokenizer), quiet=True)
        return Trainer(loaded, data, TrainConfig(data="", student="", out="", global_batch=3), bfloat16=False)

    rows = write_data(tmp_path / "rows.jsonl", weighted_rows(2))
    first, second = trainer(), trainer()
    with RunDirectory(tmp_path / "out", {}) as directory:
        directory.resume(first.trained, first.optimizer)
        first.measure(0)
        first.update(0)
        directory.save(1, first.trained, first.optimizer)
        assert directory.resume(second.trained, second.optimizer) == 1
    for one in (first, second):
        one.measure(1)
        one.update(1)
    assert all(torch.equal(second.trained[name], p) for name, p in first.trained.items())


def test_one_run_a_directory(tmp_path, data, student):
    with RunDirectory(tmp_path / "out", {}), pytest.raises(UserError, match="another run"):
        run(data, student, tmp_path / "out")


@pytest.mark.parametrize(
    ("loss", "norm", "fault"),
    [
        (2.0, 1.0, None),
        (4.9, 50.0, None),
        (5.2, 1.0, "the loss jumps to 5.2 from 2"),
        (2.0, 101.0, "the gradient norm jumps to 101 from 1"),
        (float("nan"), 1.0, "the loss is nan"),
        (2.0, float("inf"), "the gradient norm inf"),
    ],
)
def test_the_guard(loss, norm, fault):
    past = [{"step": i, "loss": 2.0 + 0.01 * (i % 3 - 1), "grad_norm": 1.0} for i in range(30)]
    said = Guard(3.0, 100.0, past).fault(loss, norm)
    said = said and ". ".join(said)
    assert said is None if fault is None else fault in said
    if loss == loss and norm < float("inf"):
        assert Guard(0.0, 0.0, past).fault(loss, norm) is None
        assert Guard(3.0, 100.0, past[:5]).fault(loss, norm) is None  # too few to judge by


# Held out


def test_early_stop_leaves_the_best_weights(tmp_path, data, student):
    # The rate is far too high for what is held out, so its loss rises soon.
    rows = [
        {**row, "messages": [row["messages"][0], {"role": "assistant", "content": "No. " * 9}]}
        for row in weighted_rows()
    ]
    held_out = str(write_data(tmp_path / "held.jsonl", rows))
    settings = {"epochs": 20, "global_batch": 4, "lr": 1e-2, "eval_every": 2, "patience": 3, "eval_data": held_out}
    summary = run(data, student, tmp_path / "out", **settings)
    lines = [line for line in metrics(tmp_path / "out") if "eval_loss" in line]
    best = min(range(len(lines)), key=lambda i: lines[i]["eval_loss"])
    assert summary.steps < 60
    assert (best, lines[best]["step"]) == (len(lines) - 4, summary.best_step)
    assert f"best after step {summary.best_step}" in "\n".join(summary.lines())
    scores = Scorer.from_pretrained(str(tmp_path / "out"), device="cpu", dtype="float32").score(rows)
    assert np.mean([score.nll for score in scores]) == pytest.approx(lines[best]["eval_loss"], rel=1e-5)
    assert not list((tmp_path / "out").glob("best-*"))
    # A run that was stopped on the way comes to the same, whatever had been kept by then.
    best = summary.best_step
    for name, stops, how in (("a", best + 1, KeyboardInterrupt), ("b", 1, DiedError), ("c", best + 1, DiedError)):
        parts = tmp_path / name
        run_until(stops, data, student, parts, how=how, save_every=best - 1, **settings)
        assert run(data, student, parts, save_every=best - 1, **settings).best_step == best
        assert metrics(parts) == metrics(tmp_path / "out")
        ours, theirs = (tensors(out / "model.safetensors") for out in (parts, tmp_path / "out"))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_max_steps_end_the_schedule(tmp_path, data, student):
    summary = run(data, student, tmp_path / "out", max_steps=4, eval_data=str(data), eval_every=3)
    lines = metrics(tmp_path / "out")
    assert summary.steps == 4
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 4]
    assert lines[-2]["lr"] < 1e-3 < lines[1]["lr"]


def test_the_probe_says_how_fast_each_trajectory_was_learnt(tmp_path, data, student):
    out = tmp_path / "out"
    run(data, student, out, probe=str(data), **STEPS)
    table = pq.read_table(out / "probe.parquet").to_pylist()
    rows = weighted_rows()
    assert [(row["problem_id"], row["candidate_id"]) for row in table] == [
        (str(row["problem_id"]), str(row["candidate_id"])) for row in rows
    ]
    before, after = (
        [score.nll for score in Scorer.from_pretrained(str(path), device="cpu", dtype="float32").score(rows)]
        for path in (student, out)
    )
    for row, was, now in zip(table, before, after, strict=True):
        assert row["nll_before"] == pytest.approx(was, rel=1e-5)
        assert row["nll_after"] == pytest.approx(now, rel=1e-4)
        assert row["loss_delta"] == pytest.approx(was - now, abs=1e-4)
        assert row["rho_measured"] == pytest.approx(-np.log(now / was) / 48, rel=1e-3)
    # After a stop the probe is not measured again, which would be too late.
    run_until(19, data, student, tmp_path / "parts", probe=str(data), **STEPS)
    run(data, student, tmp_path / "parts", probe=str(data), **STEPS)
    assert pq.read_table(tmp_path / "parts" / "probe.parquet").to_pylist() == table


def test_a_probe_of_a_selection_bears_its_names(tmp_path, student):
    rows = [
        {**row, "meta": {"problem_id": 100 + i, "candidate_id": "c"}, "problem_id": 1}
        for i, row in enumerate(weighted_rows(1))
    ]
    data = write_data(tmp_path / "train.jsonl", rows)
    run(data, student, tmp_path / "out", probe=str(data), epochs=1)
    assert pq.read_table(tmp_path / "out" / "probe.parquet")["problem_id"].to_pylist() == ["100", "101", "102"]


# What is seen and left


def test_tensorboard_draws_what_is_logged_once(tmp_path, data, student):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"trackers": ("tensorboard",), "eval_data": str(data), **STEPS}
    run_until(19, data, student, tmp_path / "out", **settings)
    run(data, student, tmp_path / "out", **settings)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in metrics(tmp_path / "out") if "loss" in line
    ]
    assert len(events.Scalars("eval_loss")) == 9
    run(data, student, tmp_path / "out", epochs=1, overwrite=True)
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_weights_and_biases_offline(tmp_path, data, student, monkeypatch):
    # In a process of its own: its service lives as long as the process.
    monkeypatch.setitem(command.ENVIRONMENT, "WANDB_MODE", "offline")
    out = tmp_path / "out"
    command.run("train", "--data", data, "--student", student, "--out", out, "--epochs", 1, "--track", "wandb")
    assert list((out / "wandb").glob("offline-run-*/run-*.wandb"))


def test_the_live_line(tmp_path, data, student, capsys):
    run(data, student, tmp_path / "out", epochs=1)
    line = capsys.readouterr().err.splitlines()[-1]
    for part in ("loss ", "lr ", "tokens/s", "% of the matmul ceiling", "GiB"):
        assert part in line
    last = metrics(tmp_path / "out", timed=True)[-1]
    assert 0 < last["ceiling_share"] < 1
    assert last["memory_bytes"] > 1 << 26


def test_the_model_card_tells_where_the_data_came_from(tmp_path, forks, student):
    pool = tmp_path / "pool.jsonl"
    rows = [{name: value for name, value in row.items() if name != "weight"} for row in weighted_rows()]
    write_data(pool, rows)
    scores, selection_out = str(tmp_path / "scores"), str(tmp_path / "selection")
    score_pool(ScoreConfig(pool=(str(pool),), student=str(student), out=scores, device="cpu"))
    select(SelectConfig(scores=scores, pool=(str(pool),), out=selection_out, budget=2))
    chosen = tmp_path / "selection" / "train.jsonl"
    done = forks.run(
        *("train", "--data", chosen, "--student", student, "--out", tmp_path / "out", "--preset", "lora"),
        *("--epochs", 1, "--lora-rank", 2, "--probe", chosen, "--device", "cpu", "--dtype", "float32"),
    )
    assert "probe: nll fell on" in done.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    head, body = card.split("---\n")[1:]
    assert 'library_name: "peft"' in head
    assert str(student) not in head  # no path of one machine
    selection = json.loads((tmp_path / "selection" / "manifest.json").read_text())
    shown = json.loads(body.split("~~~~json\n")[2].split("~~~~")[0])
    assert shown["selection"] == selection
    assert shown["identity"]["lora"]["rank"] == 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["config"]["lr"], manifest["config"]["epochs"]) == (1e-4, 1)
    assert {"README.md", "probe.parquet", "adapter_config.json"} <= set(manifest["files"])


def test_the_presets_are_the_papers():
    full, lora = (TrainConfig(data="", student="", out="", **PRESETS[name]) for name in ("full", "lora"))
    assert (full.lr, full.epochs, full.global_batch, full.lora) == (1e-5, 5, 64, None)
    assert (lora.lr, lora.epochs, lora.global_batch) == (1e-4, 3, 64)
    assert (lora.lora.rank, lora.lora.alpha, lora.lora.dropout) == (64, 128, 0.05)
    for config in (full, lora):
        assert (config.warmup_ratio, config.clip, config.options.max_length) == (0.05, 1.0, 32768)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lora-rank", 8), "--lora-rank needs --lora"),
        (("--patience", 2), "patience needs eval_data"),
        (("--lora", "--stochastic-rounding"), "stochastic_rounding is for bfloat16 weights that are all trained"),
        (("--lora", "--lora-alpha", -1), "lora alpha is a positive number"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, forks, data, student, words, said):
    done = forks.run("train", "--data", data, "--student", student, "--out", tmp_path / "out", *words, code=2)
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_the_models_head_is_trained_too(tmp_path):
    # Softcap, scale and bias go through the packed loop as well.
    model = tiny_llama(len(byte_level_tokenizer(CHATML)))
    before = model.lm_head.weight.detach().clone()
    student = save_student(tmp_path / "student", model)
    data = write_data(tmp_path / "train.jsonl", weighted_rows())
    run(data, student, tmp_path / "out", epochs=1, lr=1e-2)
    assert (tensors(tmp_path / "out" / "model.safetensors")["lm_head.weight"] - before).abs().max() > 1e-3
