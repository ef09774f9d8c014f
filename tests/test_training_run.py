"""A training run's directory: what it leaves, how it goes on after any end, and what it refuses."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lark_fast.errors import UserError
from lark_fast.rendering.renderer import RenderOptions
from lark_fast.training import state
from lark_fast.training.loop import TIMED
from lark_fast.training.state import RunDirectory
from lark_fast.training.step import Trainer
from tests.templates import CHATML
from tests.tiny import byte_level_tokenizer, tiny_llama, tiny_qwen2
from tests.training_runs import metrics, run, save_student, weighted_rows, write_data

LONG = {"epochs": 8, "global_batch": 2, "lr": 1e-3}  # 48 steps


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """With dropout, whose draws a resumed run has to repeat."""
    vocabulary = len(byte_level_tokenizer(CHATML))
    return save_student(tmp_path_factory.mktemp("student"), tiny_llama(vocabulary, attention_dropout=0.2))


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "train.jsonl", weighted_rows())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, student):
    directory = tmp_path_factory.mktemp("uninterrupted")
    data = write_data(directory / "train.jsonl", weighted_rows())
    run(data, student, directory / "out", eval_data=str(data), **LONG)
    return directory / "out"


def weights(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def train_words(data, student, out, save_every):
    """As ``run(..., **LONG)``, with the data held out too."""
    settings = {"--epochs": 8, "--global-batch": 2, "--lr": 1e-3, "--device": "cpu", "--dtype": "float32"}
    words = ["train", "--data", data, "--student", student, "--out", out, "--eval-data", data]
    return words + [str(word) for pair in {**settings, "--save-every": save_every}.items() for word in pair]


def start_and_stop(forks, data, student, out, how, *, after, save_every):
    """Run the command line until metrics.jsonl has some lines, then send it a signal; returns its exit code."""
    process = forks.start(*train_words(data, student, out, save_every))
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_bytes().splitlines()) >= after):
        time.sleep(0.002)
    process.kill(how)
    code = process.wait(60)
    assert not json.loads((out / "manifest.json").read_text())["complete"], "the run ended before it was stopped"
    return code


def test_kill_9_and_resume_bit_for_bit(tmp_path, forks, data, student, uninterrupted):
    out = tmp_path / "out"
    assert start_and_stop(forks, data, student, out, signal.SIGKILL, after=14, save_every=5) == -signal.SIGKILL
    # Whatever else a killed process may leave: an older state, a state half written, a line half written.
    (out / "resume-000002").mkdir()
    (out / "resume-000040.tmp").mkdir()
    (out / "resume-000040.tmp" / "weights.safetensors").write_bytes(b"half")
    (out / "manifest.json.tmp").write_bytes(b"{")
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 4')
    summary = run(data, student, out, eval_data=str(data), save_every=5, **LONG)
    assert summary.resumed_from is not None
    assert summary.resumed_from >= 10
    assert summary.resumed_from % 5 == 0
    assert_same_run(out, uninterrupted)
    assert not list(out.glob("resume-*"))
    assert not list(out.glob("*.tmp"))


def test_killed_before_the_first_state(tmp_path, forks, data, student, uninterrupted):
    out = tmp_path / "out"
    start_and_stop(forks, data, student, out, signal.SIGKILL, after=3, save_every=0)
    assert run(data, student, out, eval_data=str(data), **LONG).resumed_from is None
    assert_same_run(out, uninterrupted)


# SIGTERM is how schedulers end a job.
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_control_c_keeps_the_finished_steps(tmp_path, forks, data, student, uninterrupted, how):
    out = tmp_path / "out"
    assert start_and_stop(forks, data, student, out, how, after=6, save_every=0) == 130
    logged = metrics(out)[-1]["step"]
    assert logged >= 4
    assert run(data, student, out, eval_data=str(data), **LONG).resumed_from == logged
    assert_same_run(out, uninterrupted)


def test_control_c_between_the_weights_and_their_log(tmp_path, data, student, uninterrupted, monkeypatch):
    # The weights have moved and no line says so: the signal has to wait.
    def update(self, step):
        real(self, step)
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    real, before = Trainer.update, signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(KeyboardInterrupt):
        run(data, student, tmp_path / "out", eval_data=str(data), save_every=5, **LONG)
    monkeypatch.undo()
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert run(data, student, tmp_path / "out", eval_data=str(data), **LONG).resumed_from == 8
    assert_same_run(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize(
    ("method", "calls", "stops", "error", "seen"),
    [
        ("evaluate", 2, 6, KeyboardInterrupt, KeyboardInterrupt),  # in the held-out loss after epoch 1
        ("measure", 7, 6, KeyboardInterrupt, KeyboardInterrupt),  # just behind it
        ("measure", 10, 9, torch.OutOfMemoryError, UserError),
    ],
)
def test_what_was_finished_before_a_stop_is_kept(
    tmp_path, data, student, uninterrupted, monkeypatch, method, calls, stops, error, seen
):
    left = calls

    def stop(*arguments):
        nonlocal left
        left -= 1
        if not left:
            raise error
        return real(*arguments)

    real = getattr(Trainer, method)
    monkeypatch.setattr(Trainer, method, stop)
    with pytest.raises(seen):
        run(data, student, tmp_path / "out", eval_data=str(data), save_every=0, **LONG)
    monkeypatch.undo()
    assert run(data, student, tmp_path / "out", eval_data=str(data), **LONG).resumed_from == stops
    assert_same_run(tmp_path / "out", uninterrupted)


# What a process may write to a file: the manifest and the log, then the weights but not Adam's two moments of them.
@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_a_disk_that_takes_no_more(tmp_path, forks, data, student, uninterrupted, limit):
    out = tmp_path / "out"
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    done = forks.run(*train_words(data, student, out, save_every=5), code=2, before=before)
    assert f"lark-fast: --out {out}: cannot be written to: " in done.stderr
    assert "Traceback" not in done.stderr
    run(data, student, out, eval_data=str(data), **LONG)
    assert_same_run(out, uninterrupted)


def test_half_a_checkpoint_does_not_look_whole(tmp_path, data, student, monkeypatch):
    def replace(source, target):
        if Path(target).name == "tokenizer.json":
            raise KeyboardInterrupt
        os.rename(source, target)

    out = tmp_path / "out"
    monkeypatch.setattr(state.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        run(data, student, out, epochs=1)
    monkeypatch.undo()
    assert (out / "model.safetensors").exists()
    assert not (out / "config.json").exists()
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    with RunDirectory(out, {}, overwrite=True):
        assert {path.name for path in out.iterdir()} == {".lock", "manifest.json"}


def test_a_run_half_thrown_away_is_not_complete(tmp_path, data, student, monkeypatch):
    def stop(path):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    run(data, student, out, epochs=1)
    monkeypatch.setattr(state.RunDirectory, "forget_states", stop)
    with pytest.raises(KeyboardInterrupt):
        run(data, student, out, epochs=1, lr=1e-4, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"lr was 0\.003"):
        run(data, student, out, epochs=1, lr=1e-4)
    assert not run(data, student, out, epochs=1).already_complete


def test_another_micro_batch_may_go_on(tmp_path, forks, data, student, uninterrupted):
    # Micro-batches are how, not what: the way out when memory runs short must not cost what was done. Dropout draws
    # differently then, so only the shape of the run is the same.
    out = tmp_path / "out"
    start_and_stop(forks, data, student, out, signal.SIGKILL, after=8, save_every=2)
    assert run(data, student, out, eval_data=str(data), micro_batch=1, **LONG).resumed_from >= 2
    assert [line["step"] for line in metrics(out)] == [line["step"] for line in metrics(uninterrupted)]


def test_only_the_newest_state_is_kept(tmp_path, forks, data, student):
    out = tmp_path / "out"
    start_and_stop(forks, data, student, out, signal.SIGKILL, after=12, save_every=2)
    # One, or two if the signal fell between the rename and the removal.
    assert 1 <= len([path for path in out.glob("resume-*") if path.suffix != ".tmp"]) <= 2


def test_lost_metrics_are_not_papered_over(tmp_path, forks, data, student):
    out = tmp_path / "out"
    start_and_stop(forks, data, student, out, signal.SIGKILL, after=8, save_every=2)
    os.truncate(out / "metrics.jsonl", 10)
    with pytest.raises(UserError, match=r"metrics.jsonl: lines are missing"):
        run(data, student, out, eval_data=str(data), **LONG)


def test_a_complete_run_says_so_and_is_left_alone(tmp_path, data, student):
    first = run(data, student, tmp_path / "out", epochs=1)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}
    again = run(data, student, tmp_path / "out", epochs=1)
    assert again.already_complete
    assert "complete" in again.lines()[0]
    assert (again.last_loss, again.steps) == (first.last_loss, first.steps)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}
    assert after == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 2e-3}, "lr was 0.003, is 0.002"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"betas": (0.9, 0.95)}, "betas was [0.9, 0.999], is [0.9, 0.95]"),
        ({"loss_norm": "token"}, "loss_norm was 'trajectory', is 'token'"),
        ({"dtype": "bfloat16"}, "dtype was 'float32', is 'bfloat16'"),
        ({"epochs": 2}, "epochs was 1, is 2"),
        ({"global_batch": 4}, "global_batch was 5, is 4"),
        ({"warmup_ratio": 0.0}, "warmup_ratio was 0.05, is 0.0"),
        ({"weight_decay": 0.1}, "weight_decay was 0.0, is 0.1"),
        ({"clip": 0.0}, "clip was 1.0, is 0.0"),
        ({"options": RenderOptions(span="content")}, "span was 'turn', is 'content'"),
    ],
)
def test_another_config_is_refused(tmp_path, data, student, change, said):
    run(data, student, tmp_path / "out", epochs=1)
    with pytest.raises(UserError) as caught:
        run(data, student, tmp_path / "out", **({"epochs": 1} | change))
    assert said in str(caught.value)
    assert "--overwrite" in str(caught.value)


def test_other_data_or_another_student_is_refused(tmp_path, data, student):
    run(data, student, tmp_path / "out", epochs=1)
    rows = weighted_rows()
    rows[3]["weight"] *= 2
    with pytest.raises(UserError, match="data was"):
        run(write_data(tmp_path / "other.jsonl", rows), student, tmp_path / "out", epochs=1)
    other = save_student(tmp_path / "other", tiny_llama(len(byte_level_tokenizer(CHATML)), seed=1))
    with pytest.raises(UserError, match="student was"):
        run(data, other, tmp_path / "out", epochs=1)
    with pytest.raises(UserError, match="eval_data was None"):
        run(data, student, tmp_path / "out", epochs=1, eval_data=str(data))
    # The same rows from another place are the same data.
    moved = write_data(tmp_path / "moved.jsonl", weighted_rows())
    assert run(moved, student, tmp_path / "out", epochs=1).already_complete


def test_overwrite(tmp_path, data, student):
    out = tmp_path / "out"
    run(data, student, out, epochs=1)
    (out / "notes.txt").write_text("mine")
    summary = run(data, student, out, epochs=1, lr=1e-3, overwrite=True)
    assert not summary.already_complete
    assert metrics(out)[-1]["step"] == summary.steps
    assert (out / "notes.txt").read_text() == "mine"


def test_directories_that_are_not_ours_are_left_alone(tmp_path, data, student):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("text")
    (tmp_path / "full" / "draft.tmp").write_text("text")
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "manifest.json").write_text('{"complete": true}')
    with pytest.raises(UserError, match="holds other files"):
        run(data, student, tmp_path / "full", overwrite=True)
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"thesis.tex", "draft.tmp"}
    with pytest.raises(UserError, match="not a training run's"):
        run(data, student, tmp_path / "scores", overwrite=True)
    with pytest.raises(UserError, match="holds --student"):
        run(data, student, student, overwrite=True)
    with pytest.raises(UserError, match="holds --data"):
        run(data, student, tmp_path, overwrite=True)
    # Its metrics.jsonl would be data when the run goes on.
    with pytest.raises(UserError, match="lies in --data"):
        run(data.parent, student, data.parent / "out")


def test_the_checkpoint_is_the_students_kind(tmp_path, data):
    # bf16 on disk and tied embeddings, as the student has them; the tokenizer's files byte for byte.
    model = tiny_qwen2(len(byte_level_tokenizer(CHATML)))
    student = save_student(tmp_path / "student", model, dtype=torch.bfloat16)
    out = tmp_path / "out"
    run(data, student, out, epochs=30, lr=1e-2, eval_data=str(data))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (student / name).read_bytes()
    stored, own = weights(out), weights(student)
    assert stored.keys() == own.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    trained, tokenizer = AutoModelForCausalLM.from_pretrained(out, dtype="auto"), AutoTokenizer.from_pretrained(out)
    assert trained.dtype == torch.bfloat16
    # It has learnt its rows by heart: it answers one of them as they do.
    question = [{"role": "user", "content": "What is 2 and 1?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = trained.float().generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(made[0, prompt.input_ids.shape[1] :]).startswith("The answer is 3.")
    losses = [line["eval_loss"] for line in metrics(out) if "eval_loss" in line]
    assert len(losses) == 31
    assert losses[-1] < 0.1 * losses[0]


def test_the_template_trained_with_goes_along(tmp_path, data, student):
    template = CHATML.replace("'\\n' ~ m.content", "': ' ~ m.content").replace("assistant\\n", "assistant: ")
    assert template != CHATML
    run(data, student, tmp_path / "out", epochs=1, chat_template=template)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_what_is_written(tmp_path, data, student):
    out = tmp_path / "out"
    summary = run(data, student, out, eval_data=str(data))
    lines = metrics(out, timed=True)
    assert lines[0].keys() == {"step", "epoch", "eval_loss"}
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert [line["epoch"] for line in lines] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    steps = [line for line in lines if "eval_loss" not in line]
    assert len(steps) == 6
    named = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", *TIMED}
    assert all(line.keys() == named for line in steps)
    assert all(line.keys() == lines[0].keys() for line in lines if line not in steps)
    assert summary.first_loss == lines[1]["loss"]
    assert summary.eval_losses == tuple(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["counts"]["steps"] == 6
    assert manifest["config"]["lr"] == 3e-3
    assert len(manifest["identity"]["data"]) == 64
    assert {path.name for path in out.iterdir()} == {*manifest["files"], "metrics.jsonl", "manifest.json"}


def test_held_out_rows_count_whatever_their_weight(tmp_path, data, student):
    light = write_data(tmp_path / "light.jsonl", [{**row, "weight": 0} for row in weighted_rows()])
    losses = [run(data, student, tmp_path / path.stem, eval_data=str(path)).eval_losses for path in (data, light)]
    assert losses[0] == losses[1]


def test_without_matplotlib(tmp_path, data, student, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(data, student, tmp_path / "out", epochs=1)
    assert "pip install 'lark-fast[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "loss.png").exists()


def test_long_trajectories_are_cut_and_counted(tmp_path, student, capsys):
    rows = weighted_rows(1)
    rows[1]["messages"][1]["content"] = "and then " * 400
    summary = run(write_data(tmp_path / "long.jsonl", rows), student, tmp_path / "out", epochs=1)
    assert summary.truncated == 1
    assert "1 of 3 trajectories are cut at 512 tokens" in capsys.readouterr().err
