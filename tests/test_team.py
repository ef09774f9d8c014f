"""One process a device: any number of them, any of them lost, the same store. A fresh interpreter takes seconds to
start, so few runs try many things."""

import json
import random
import signal
import time

import numpy as np
import psutil
import pytest

from lark_fast.errors import UserError
from lark_fast.scoring.forward import Work
from lark_fast.scoring.layout import Layout
from lark_fast.scoring.parts import part_files
from lark_fast.scoring.run import ScoreConfig
from lark_fast.scoring.store import read_manifest
from lark_fast.scoring.team import Team, _Job, choose_devices
from lark_fast.scoring.team_member import Result, SentScore
from tests import races
from tests.command import NO_CEILING, make_records, write_jsonl, write_student
from tests.score_rows import table
from tests.test_engine_faults import rows_of, tree, wait_for

QUICK = "import lark_fast.packing as p; p.CPU_WINDOW_FLOP = 0\n"  # windows of four packs
DEADLY = """
import os
from transformers import LlamaForCausalLM

class DeadlyForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids=None, **more):
        if (input_ids == {token}).any():
            os.kill(os.getpid(), 9)
        return super().forward(input_ids=input_ids, **more)
"""


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


def words(pool, student, out, *more):
    """The words of the command; float32, so that what differs differs for a reason."""
    how = ("--dtype", "float32", "--device", "cpu", "--tokens-per-batch", 256)
    return ("score", "--pool", pool, "--student", student, "--out", out, *how, *more)


def members(run):
    """The processes that score."""
    return [process for process in tree(run.pid) if "team_member" in " ".join(process.cmdline())]


def by_key(out):
    return {(row["problem_id"], row["candidate_id"]): row for row in table(out).to_pylist()}


def nothing_left(processes):
    _, alive = psutil.wait_procs(processes, 10)
    assert not alive


def write_deadly(student, deadly, token):
    """The student, but that this token ends its process."""
    deadly.mkdir()
    for file in student.iterdir():
        (deadly / file.name).write_bytes(file.read_bytes())
    config = json.loads((deadly / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_deadly.DeadlyForCausalLM"}
    (deadly / "config.json").write_text(json.dumps(config))
    (deadly / "modeling_deadly.py").write_text(DEADLY.format(token=token))
    return deadly


def test_killed_at_random_and_by_a_record(tmp_path, forks, student):
    """What is lost is done by others; what ends its process three times is left out, and nothing else is."""
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(student)("~", add_special_tokens=False)["input_ids"]
    deadly = write_deadly(student, tmp_path / "deadly", token)
    records = list(make_records(120, 4))
    long = "Let me think. " * 60  # a pass of its own
    poison = {
        "problem_id": "p",
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": long + "~"}],
    }
    pool = write_jsonl(tmp_path / "pool.jsonl", [*records[:99], poison, *records[99:]])
    run = forks.start(
        *words(pool, deadly, tmp_path / "s", "--devices", 2, "--trust-remote-code", "--per-token"), before=QUICK
    )
    wait_for(lambda: list(tmp_path.glob("s/journal-*")), run, 300)
    rng, killed = random.Random(0), 0
    while run.poll() is None and killed < 2:
        working = members(run)
        if len(working) == 2:
            rng.choice(working).kill()
            killed += 1
        time.sleep(2)
    run.wait(400)
    run.ended(0)
    assert killed
    rejected = [json.loads(line) for line in (tmp_path / "s" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in rejected] == [
        (100, "the process that scored it was killed (SIGKILL), 3 times")
    ]
    assert "the process on cpu was killed (SIGKILL): its passes are done again" in run.stderr
    write_jsonl(pool, records)
    forks.run(*words(pool, student, tmp_path / "once", "--per-token"), before=QUICK)
    ours, theirs = (table(tmp_path / name).sort_by("source") for name in ("s", "once"))
    assert ours.num_rows == theirs.num_rows == len(records)
    keys = ("problem_id", "candidate_id")
    order = [(key, "ascending") for key in keys]
    ours, theirs = ours.sort_by(order), theirs.sort_by(order)
    assert [ours[key] for key in keys] == [theirs[key] for key in keys]
    for name in ("nll", "brier", "entropy", "rank_mean", "rsr", "rho", "g_hat"):
        assert ours[name].to_pylist() == pytest.approx(theirs[name].to_pylist(), rel=1e-6, abs=1e-6)


def test_stopped_and_gone_on_with_with_another_number(tmp_path, forks, student):
    """Four, SIGTERM, two, kill -9, one: bit for bit a run that nothing happened to, with local scores too."""
    pool = write_jsonl(tmp_path / "pool.jsonl", make_records(90, 4))
    out, more = tmp_path / "s", ("--local-steps", 1)
    run = forks.start(*words(pool, student, out, "--devices", 4, *more), before=QUICK)
    wait_for(lambda: list(out.glob("journal-*")), run, 300)
    own = members(run)
    assert len(own) == 4
    run.kill(signal.SIGTERM)
    run.ended(130)
    nothing_left(own)
    kept = len(rows_of(out))
    assert 0 < kept < 360
    run = forks.start(*words(pool, student, out, "--devices", 1, *more), before=QUICK)
    wait_for(lambda: len(rows_of(out)) > kept, run, 300)
    own = members(run)
    run.kill(signal.SIGKILL)
    run.wait()
    nothing_left(own)
    kept = len(rows_of(out))
    assert kept < 360
    done = forks.run(*words(pool, student, out, *more), before=QUICK)
    assert f"{360 - kept} trajectories scored" in done.stdout
    forks.run(*words(pool, student, tmp_path / "once", *more), before=QUICK)
    assert table(out).equals(table(tmp_path / "once"))
    assert [part.read_bytes() for part in part_files(out)] == [p.read_bytes() for p in part_files(tmp_path / "once")]
    assert read_manifest(out)["complete"]
    assert not list(out.glob("journal-*"))


def test_races(tmp_path, forks, student):
    """Problems race wherever they are given to; one with a record that ends its process runs in none."""
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(student)("~", add_special_tokens=False)["input_ids"]
    deadly = write_deadly(student, tmp_path / "deadly", token)
    records = list(races.make_records())
    poisoned = [dict(record) for record in records]
    poisoned[13]["messages"] = [*records[13]["messages"][:1], {"role": "assistant", "content": "so we ~ " * 60}]
    (pool, bad), asked = (tmp_path / "pool.jsonl", tmp_path / "bad.jsonl"), ("--race", 2, "--race-risk", 0.2)
    write_jsonl(pool, records)
    write_jsonl(bad, poisoned)
    forks.run(*words(pool, student, tmp_path / "once", *asked), before=races.RACE_SHORT_ONES)
    out = tmp_path / "s"
    once = races.RACE_SHORT_ONES + "import lark_fast.scoring.team as t; t.MOST_LOSSES = 1\n"
    run = forks.run(
        *words(bad, deadly, out, *asked, "--devices", 2, "--trust-remote-code", "--json"),
        before=NO_CEILING + once,
    )
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in rejected] == [
        (14, "the process that scored it was killed (SIGKILL), 1 times")
    ]
    ours, theirs = by_key(out), by_key(tmp_path / "once")
    assert len(ours) == len(records) - 1
    stopped = 0
    for key, row in ours.items():
        if key[0] == str(records[13]["problem_id"]):  # what is left of it was scored in full
            assert (row["n_raced"], row["winner"]) == (row["n_tokens"], None)
            continue
        assert {name: row[name] for name in ("n_raced", "winner", "audited")} == {
            name: theirs[key][name] for name in ("n_raced", "winner", "audited")
        }
        assert row["nll"] == pytest.approx(theirs[key]["nll"], rel=1e-6)
        stopped += row["n_raced"] < row["n_tokens"]
    assert stopped > 10
    told = json.loads(run.stdout)
    assert told["passed_tokens"] < told["input_tokens"]
    assert told["forward_flop"] > 0
    # A pool that ends nobody's process comes to the bytes of one process, after SIGTERM too.
    run = forks.start(*words(pool, student, tmp_path / "two", *asked, "--devices", 2), before=races.RACE_SHORT_ONES)
    wait_for(lambda: list(tmp_path.glob("two/journal-*")), run, 300)
    run.kill(signal.SIGTERM)
    run.ended(130)
    forks.run(*words(pool, student, tmp_path / "two", *asked), before=races.RACE_SHORT_ONES)
    ours, theirs = ([part.read_bytes() for part in part_files(tmp_path / name)] for name in ("two", "once"))
    assert ours == theirs


def test_results_come_to_whom_they_are_of():
    """A problem that runs in no race is laid out anew where it is scored."""
    team = Team(ScoreConfig(pool=("p",), student="s", out="o"), ["cpu"])
    team.layout = Layout(packed=True, border=None, tokens_per_batch=100)
    ids = [np.arange(1, n) for n in (5, 9, 7)]
    job = _Job(0, team.layout.prepare(["a", "b", "c"], [(each, each) for each in ids]), left={0, 1, 2})
    team._jobs[0] = job
    member = team._members[0]
    member.jobs.append(job)
    sent = [SentScore({"nll": float(place)}, 1, 1, None, None) for place in (1, 2, 0)]
    batch, scored = team._take(member, Result(job=0, members=[1, 2, 0], scored=sent, work=Work()))
    assert [(name, one.means["nll"]) for name, one in zip(batch.members, scored, strict=True)] == [
        ("b", 1.0),
        ("c", 2.0),
        ("a", 0.0),
    ]
    assert batch.lengths == [8, 6, 4]
    assert not team._jobs
    assert not member.jobs


def test_a_student_that_nobody_can_load(tmp_path, forks, student):
    pool = write_jsonl(tmp_path / "pool.jsonl", make_records(2))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in student.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    refused = forks.run(*words(pool, broken, tmp_path / "s", "--devices", 1), code=2)
    assert refused.stderr.count("\n") == 1
    assert f"lark-fast: {broken}: cannot be loaded as a student" in refused.stderr


@pytest.mark.parametrize(
    ("devices", "device", "message"),
    [
        ("0", "cpu", "--devices 0: not all, a number, or names as in 0,2"),
        ("two", "cpu", "--devices two: not all, a number, or names"),
        ("2", "cuda:1", "--devices 2: goes with --device cuda or cpu, not with one GPU"),
        ("all", "cpu", "--devices all: no GPU is there"),
        ("gpu,cuda:0", "auto", "--devices gpu,cuda:0: no device is called gpu"),
        ("0,99", "auto", "cuda:0 is not there|cuda:99 is not there"),
        (",", "auto", "--devices ,: each GPU once"),
        ("99", "cuda", r"--devices 99: this machine has \d+ GPUs"),
        ("meta,", "auto", "meta is neither a GPU nor cpu"),
    ],
)
def test_devices_that_are_not_there(devices, device, message):
    with pytest.raises(UserError, match=message):
        choose_devices(devices, device)


def test_devices_of_a_cpu():
    assert choose_devices("3", "cpu") == ["cpu"] * 3
    assert choose_devices("cpu,cpu", "auto") == ["cpu"] * 2
