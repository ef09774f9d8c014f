"""Training over ranks, started by torchrun as a user does: the same curve, the same checkpoint, the same resume."""

import json
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lark_fast import Scorer
from lark_fast.training.config import LoraOptions
from tests.command import ENVIRONMENT
from tests.templates import CHATML
from tests.tiny import byte_level_tokenizer, tiny_qwen2
from tests.training_runs import metrics, run, save_student, weighted_rows, write_data

SETTINGS = {"--epochs": 4, "--global-batch": 5, "--lr": 3e-3, "--device": "cpu", "--dtype": "float32"}
TOLERANCE = 1e-5


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """With tied embeddings: one tensor of two names, and one gather."""
    return save_student(tmp_path_factory.mktemp("student"), tiny_qwen2(len(byte_level_tokenizer(CHATML))))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "train.jsonl", weighted_rows())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, student, data):
    out = tmp_path_factory.mktemp("alone") / "out"
    run(data, student, out, epochs=4, eval_data=str(data), probe=str(data))
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory, student, data):
    out = tmp_path_factory.mktemp("two") / "out"
    return out, over_ranks(data, student, out)


def torchrun(data, student, out, *more, held_out=None, ranks=2):
    settings = [str(word) for pair in SETTINGS.items() for word in pair]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *("-m", "lark_fast", "train", "--data", str(data), "--student", str(student), "--out", str(out)),
        *("--eval-data", str(held_out or data), "--probe", str(data), *settings, *map(str, more)),
    ]


def over_ranks(*arguments, **options):
    done = subprocess.run(
        torchrun(*arguments, **options), env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def start_forks(forks, *arguments, ranks=2, **options):
    """The same ranks without torchrun and without the imports."""
    words = torchrun(*arguments, **options)
    return forks.start_ranks([""] * ranks, *words[words.index("lark_fast") + 1 :])


def over_forks(forks, *arguments, **options):
    """They come to their end: rank 0."""
    first, *_ = [rank.ended() for rank in start_forks(forks, *arguments, **options)]
    return first


def differ(a, b):
    """The largest relative difference of two runs' losses, of training and held out."""
    assert [line["step"] for line in a] == [line["step"] for line in b]
    names = ("loss", "eval_loss")
    return max(abs(x[name] / y[name] - 1) for x, y in zip(a, b, strict=True) for name in names if name in x)


def weights(out):
    with safe_open(out / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict


def assert_as_alone(out, done, ranks, alone):
    assert differ(metrics(out), metrics(alone)) < TOLERANCE
    # One of them speaks.
    assert done.stdout.count("12 steps over 12 trajectories") == 1
    assert done.stdout.count("probe: nll fell") == 1
    assert json.loads((out / "manifest.json").read_text())["ranks"] == ranks
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in alone.iterdir())
    ours, theirs = weights(out), weights(alone)
    assert ours.keys() == theirs.keys()
    moved = max((ours[name] - theirs[name]).norm() / theirs[name].norm() for name in ours)
    assert moved < 1e-2  # Adam turns rounding into steps of full size wherever a gradient is near zero
    assert AutoModelForCausalLM.from_pretrained(out).config.architectures == ["Qwen2ForCausalLM"]


def test_two_ranks_are_one(two, alone):
    assert_as_alone(*two, 2, alone)


def test_a_rank_without_work(tmp_path, forks, data, student, alone):
    # 12 rows in batches of 5: the third batch has 2, and of 3 ranks one has nothing to do there.
    assert_as_alone(tmp_path / "out", over_forks(forks, data, student, tmp_path / "out", ranks=3), 3, alone)


@pytest.mark.parametrize(("how", "ranks"), [(signal.SIGKILL, 1)])
def test_stopped_and_gone_on_with(tmp_path, forks, data, student, alone, how, ranks):
    # Two ranks begin, are stopped, and as many or fewer go on.
    out = tmp_path / "out"
    started = start_forks(forks, data, student, out, "--save-every", 3)
    log = out / "metrics.jsonl"
    while started[0].poll() is None and not (log.exists() and len(log.read_bytes().splitlines()) >= 5):
        time.sleep(0.002)
    for rank in started:
        rank.kill(how)
    for rank in started:
        rank.wait(60)
    assert not json.loads((out / "manifest.json").read_text())["complete"], "the run ended before it was stopped"
    states = list(out.glob("resume-*"))
    if how == signal.SIGTERM:
        steps = [line["step"] for line in metrics(out) if "loss" in line]
        assert [path.name for path in states] == [f"resume-{steps[-1]:06d}"]  # what was finished is kept
    if ranks == 1:
        summary = run(data, student, out, epochs=4, eval_data=str(data), probe=str(data))
        assert summary.resumed_from == 3
    else:
        over_ranks(data, student, out)
    assert differ(metrics(out), metrics(alone)) < TOLERANCE


def test_the_same_ranks_come_to_the_same_bits(tmp_path, forks, data, student, two):
    over_forks(forks, data, student, tmp_path / "out")
    assert metrics(tmp_path / "out") == metrics(two[0])
    ours, theirs = weights(tmp_path / "out"), weights(two[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_adapters_over_ranks(tmp_path, forks, data, student):
    lora = LoraOptions(rank=4, dropout=0.0)
    run(data, student, tmp_path / "a", epochs=4, eval_data=str(data), probe=str(data), lora=lora)
    over_forks(forks, data, student, tmp_path / "b", "--lora", "--lora-rank", 4, "--lora-dropout", 0)
    assert differ(metrics(tmp_path / "a"), metrics(tmp_path / "b")) < TOLERANCE
    assert (tmp_path / "b" / "adapter_model.safetensors").exists()


def test_early_stop_over_ranks(tmp_path, forks, data, student):
    # Held-out passes, which no backward pass follows, between the steps and before weights are kept and loaded.
    other = {"role": "assistant", "content": "No. " * 9}
    rows = [{**row, "messages": [row["messages"][0], other]} for row in weighted_rows()]
    held_out = write_data(tmp_path / "held.jsonl", rows)
    settings = {"epochs": 30, "lr": 6e-3, "global_batch": 6, "eval_every": 2, "patience": 3}
    summary = run(data, student, tmp_path / "a", eval_data=str(held_out), probe=str(data), **settings)
    assert summary.best_step < summary.steps < 60
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    over_forks(forks, data, student, tmp_path / "b", *words, held_out=held_out)
    assert differ(metrics(tmp_path / "a"), metrics(tmp_path / "b")) < 1e-4  # of a rate so high that the loss rises
    a, b = (pq.read_table(tmp_path / name / "probe.parquet")["nll_after"].to_pylist() for name in ("a", "b"))
    assert b == pytest.approx(a, rel=1e-4)
    best = min(line["eval_loss"] for line in metrics(tmp_path / "b") if "eval_loss" in line)
    scores = Scorer.from_pretrained(str(tmp_path / "b"), device="cpu", dtype="float32").score(rows)
    assert sum(score.nll for score in scores) / len(scores) == pytest.approx(best, rel=1e-5)


def test_bad_input_ends_all_ranks(tmp_path, forks, student):
    rows = weighted_rows()
    rows[3]["weight"] = "heavy"
    bad = write_data(tmp_path / "bad.jsonl", rows)
    started = start_forks(forks, bad, student, tmp_path / "out")
    assert all(rank.wait() != 0 for rank in started)  # each by itself: no torchrun ends them
    assert f"lark-fast: {bad}:4: weight is 'heavy'" in started[0].stderr
    assert not (tmp_path / "out").exists()
