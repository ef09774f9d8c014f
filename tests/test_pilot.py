"""``lark-fast pilot`` as people use it, on a tiny student: runs, files, faults, and going on after a stop."""

import gc
import json
import signal
import time
import weakref

import pytest

from lark_fast.pilot.config import PilotConfig
from lark_fast.pilot.run import pilot
from lark_fast.student import load_student
from tests.command import NO_CEILING, make_records, write_jsonl, write_student

PROBLEMS = 42
OPTIONS = (
    *("--policies", "chi2,random,full", "--seeds", 2, "--buckets", 2, "--budget", 2, "--tokens", 900, "--lr", "3e-3"),
    *("--global-batch", 4, "--evaluations", 2, "--problems", 12, "--dtype", "float32"),
)
FILES = ["manifest.json", "pilot.json", "pilot.md", "pilot.png", "runs.jsonl"]


def records(problems=PROBLEMS):
    for number, record in enumerate(make_records(problems, candidates=3)):
        yield {**record, "correct": number % 2 == 0, "weight": 5, "meta": "theirs"}


@pytest.fixture(scope="module")
def forks(forks):
    return forks.preceded_by(NO_CEILING)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("pool") / "pool.jsonl", records())


@pytest.fixture(scope="module")
def piloted(pool, student, tmp_path_factory, forks):
    out = tmp_path_factory.mktemp("piloted") / "out"
    done = forks.run("pilot", "--pool", pool, "--student", student, "--out", out, *OPTIONS)
    return out, done


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(result):
    runs = [{**run, "tokens_per_second": 0} for run in result["runs"]]
    return {**result, "runs": runs}


def test_what_is_written(piloted):
    out, done = piloted
    for name in FILES:
        assert (out / name).stat().st_size > 0, name
    runs = jsonl(out / "runs.jsonl")
    contenders = ["chi2", "random", "full", "bucket-1-of-2", "bucket-2-of-2"]
    assert [(run["contender"], run["seed"]) for run in runs] == [(c, seed) for seed in range(2) for c in contenders]
    assert not list((out / "runs").iterdir())  # the weights are not kept
    for run in runs:
        assert run["tokens"] == pytest.approx(900, rel=0.15)  # half a step of four
        assert len(run["training"]) == run["steps"]
        assert run["held_out"][0][0] == 0
        assert run["held_out"][-1][0] == run["tokens"]
        assert run["held_out"][-1][1] < run["held_out"][0][1]
        assert (run["own"] is None) == run["contender"].startswith("bucket")
    # One student, so one start.
    assert len({run["held_out"][0][1] for run in runs}) == 1

    result = json.loads((out / "pilot.json").read_text())
    assert result["trained_problems"] == 12
    assert result["held_out_problems"] == PROBLEMS // 5
    assert [gap["policy"] for gap in result["gaps"]] == ["chi2", "full"]
    assert len(result["worth"]["gains"]) == 2
    assert all(sentence in done.stdout for sentence in result["verdict"])
    assert "10 of 10 runs" in done.stdout
    assert "left" in done.stdout


def test_no_problem_is_trained_on_and_held_out(piloted):
    out, _ = piloted
    held_out = {row["problem_id"] for row in jsonl(out / "held-out.jsonl")}
    trained = {row["problem_id"] for row in jsonl(out / "pool.jsonl")}
    assert len(held_out) == 8
    assert not held_out & trained
    for path in (out / "selections").glob("**/train.jsonl"):
        ids = {row.get("meta", row)["problem_id"] for row in jsonl(path)}
        assert ids <= (held_out if path.parent.name == "held-out" else trained), path


def test_buckets_divide_the_pool_by_rank_of_g_hat(piloted):
    out, _ = piloted
    parts = [jsonl(out / "selections" / f"bucket-{n}-of-2" / "train.jsonl") for n in (1, 2)]
    keys = [{(row["problem_id"], row["candidate_id"]) for row in part} for part in parts]
    assert len(keys[0]) == 12  # of three, the lowest; two are in the upper half
    assert len(keys[1]) == 24
    assert not keys[0] & keys[1]
    chosen = jsonl(out / "selections" / "chi2" / "pool" / "train.jsonl")
    assert {(row["meta"]["problem_id"], row["meta"]["candidate_id"]) for row in chosen} == keys[1]


def test_it_goes_on_after_kill_9(tmp_path, piloted, pool, student, forks):
    arguments = ("pilot", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS)
    started, path = forks.start(*arguments), tmp_path / "out" / "runs.jsonl"
    until = time.monotonic() + 90
    while not (path.exists() and path.read_bytes().count(b"\n") > 2) and time.monotonic() < until:
        time.sleep(0.003)
    started.kill(signal.SIGKILL)
    started.wait()
    kept = path.read_bytes()
    assert 2 < kept.count(b"\n") < 10
    done = forks.run(*arguments)
    assert path.read_bytes().startswith(kept)
    assert done.stdout.count(" runs: ") == 10 - kept.count(b"\n")
    ours, theirs = (json.loads((out / "pilot.json").read_text()) for out in (tmp_path / "out", piloted[0]))
    assert untimed(ours) == untimed(theirs)


def test_more_seeds_and_policies_add_runs(tmp_path, pool, student, forks):
    arguments = ("pilot", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS, "--buckets", 0)
    forks.run(*arguments, "--seeds", 1, "--policies", "random,nll")
    first = (tmp_path / "out" / "runs.jsonl").read_bytes()
    assert first.count(b"\n") == 2
    done = forks.run(*arguments, "--seeds", 2, "--policies", "random,nll,rsr")
    added = (tmp_path / "out" / "runs.jsonl").read_bytes()
    assert added.startswith(first)
    assert added.count(b"\n") == 6
    assert "rsr - random" in done.stdout
    # random draws other candidates with another seed, nll does not.
    names = {path.name for path in (tmp_path / "out" / "selections").iterdir()}
    assert names == {"random-0", "random-1", "nll", "rsr", "full"} - {"full"}
    other = forks.run(*arguments, "--lr", "1e-3", code=2)
    assert "was begun otherwise (lr 0.003 there, 0.001 now)" in other.stderr


def test_one_seed_tells_nothing_of_chance_and_checkpoints_can_stay(tmp_path, pool, student, forks):
    done = forks.run(
        *("pilot", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS, "--buckets", 0),
        *("--seeds", 1, "--policies", "chi2,random", "--lora", "--keep-checkpoints", "--held-out-where", "correct"),
    )
    assert "One seed tells nothing of chance" in done.stdout
    assert "where correct" in done.stdout
    assert (tmp_path / "out" / "runs" / "chi2-0" / "adapter_config.json").exists()
    assert {row["correct"] for row in jsonl(tmp_path / "out" / "measured.jsonl")} == {True}
    assert {row["correct"] for row in jsonl(tmp_path / "out" / "held-out.jsonl")} == {True, False}


def test_a_pool_too_small_to_say_anything(tmp_path, student, forks):
    pool = write_jsonl(tmp_path / "pool.jsonl", records(10))
    arguments = ("--student", student, "--out", tmp_path / "out", *OPTIONS, "--buckets", 0, "--seeds", 2)
    done = forks.run("pilot", "--pool", pool, *arguments, "--policies", "chi2,random")
    assert "Too small to say anything: 2 problem(s) held out, where 8 is the least" in done.stdout
    single = write_jsonl(tmp_path / "single.jsonl", records(1))
    done = forks.run("pilot", "--pool", single, *arguments, "--overwrite", code=2)
    assert "has 1 problem(s); a pilot needs some to hold out" in done.stderr


def test_a_rate_at_which_the_loss_explodes(tmp_path, pool, student, forks):
    done = forks.run(
        *("pilot", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS, "--lr", 1e5),
        *("--tokens", 4000, "--buckets", 0, "--seeds", 1, "--policies", "random,full"),
        code=2,
    )
    assert "every run blows up; the first, at step" in done.stderr
    assert "Lower --lr" in done.stderr
    assert [run["diverged"] is None for run in jsonl(tmp_path / "out" / "runs.jsonl")] == [False, False]


def test_policies_that_take_everything_are_one(tmp_path, student, forks):
    pool = write_jsonl(tmp_path / "pool.jsonl", records(45))
    done = forks.run(
        *("pilot", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS),
        *("--budget", 3, "--policies", "chi2,random,full", "--buckets", 0),
    )
    assert "chi2, random and full are one selection: no problem has more candidates than the budget of 3" in done.stdout
    assert "cannot be told" not in done.stdout


def test_fewer_buckets_where_candidates_are_few(tmp_path, student, forks):
    pairs = write_jsonl(tmp_path / "pool.jsonl", make_records(12, candidates=2))
    arguments = ("pilot", "--pool", pairs, "--student", student, "--out", tmp_path / "out", *OPTIONS, "--seeds", 1)
    done = forks.run(*arguments, "--buckets", 5, "--policies", "full")
    assert "2 buckets instead of 5: the problems have too few candidates" in done.stdout
    assert {run["contender"] for run in jsonl(tmp_path / "out" / "runs.jsonl")} == {
        *("full", "bucket-1-of-2", "bucket-2-of-2")
    }
    single = write_jsonl(tmp_path / "single.jsonl", make_records(12, candidates=1))
    arguments = ("--student", student, "--out", tmp_path / "single", *OPTIONS, "--seeds", 1, "--policies", "")
    done = forks.run("pilot", "--pool", single, *arguments, code=2)
    assert "no problem has two candidates" in done.stderr


def test_a_bucket_holds_a_candidate_of_every_problem_it_is_made_of(tmp_path, student, forks):
    # One problem has five candidates, the others three: five buckets would be that problem alone.
    rows = [row for row in make_records(13, candidates=5) if row["problem_id"] == 3 or row["candidate_id"] < 3]
    rows = [row for row in rows if row["problem_id"] != 4 or row["candidate_id"] < 2]
    pool = write_jsonl(tmp_path / "pool.jsonl", rows)
    arguments = ("pilot", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS, "--seeds", 1)
    done = forks.run(*arguments, "--problems", 20, "--buckets", 5, "--policies", "")
    assert "3 buckets instead of 5" in done.stdout
    assert "Nothing was compared" not in done.stdout
    problems = [
        {row["problem_id"] for row in jsonl(tmp_path / "out" / "selections" / f"bucket-{n}-of-3" / "train.jsonl")}
        for n in (1, 2, 3)
    ]
    assert problems[0] == problems[1] == problems[2]
    assert len(problems[0]) > 8
    assert 4 not in problems[0]


def test_what_cannot_be_selected_is_told_before_anything_is_trained(tmp_path, pool, student, forks):
    done = forks.run(
        *("pilot", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS),
        *("--policies", "random,local"),
        code=2,
    )
    assert "local_step_nll" in done.stderr
    assert not jsonl(tmp_path / "out" / "runs.jsonl")


def test_a_pilot_killed_between_a_line_and_the_clearing(tmp_path, pool, student, forks):
    arguments = ("pilot", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS, "--buckets", 0)
    forks.run(*arguments, "--seeds", 1, "--policies", "random")
    left = tmp_path / "out" / "runs" / "random-0"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"large")
    forks.run(*arguments, "--seeds", 1, "--policies", "random")
    assert not left.exists()


def test_a_held_out_file_of_ones_own(tmp_path, pool, student, forks):
    others = [{**record, "problem_id": f"other-{record['problem_id']}"} for record in records(9)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", others)
    arguments = ("pilot", "--student", student, *OPTIONS, "--buckets", 0, "--seeds", 1, "--policies", "random")
    forks.run(*arguments, "--pool", pool, "--held-out", held_out, "--out", tmp_path / "out")
    assert {row["problem_id"] for row in jsonl(tmp_path / "out" / "measured.jsonl")} == {f"other-{n}" for n in range(9)}
    # A pool's own problem would be trained on.
    done = forks.run(*arguments, "--pool", pool, "--held-out", pool, "--out", tmp_path / "again", code=2)
    assert "is in --pool too, and would be trained on" in done.stderr
    assert f"{pool}:" in done.stderr


def test_what_cannot_be_read_is_counted_and_left_out(tmp_path, pool, student, forks):
    lines = pool.read_text().splitlines()
    broken = tmp_path / "pool.jsonl"
    broken.write_text("\n".join(["{", *lines]) + "\n")
    arguments = ("pilot", "--pool", broken, "--student", student, "--out", tmp_path / "out", *OPTIONS, "--buckets", 0)
    done = forks.run(*arguments, "--seeds", 1, "--policies", "random")
    assert f"1 record(s) cannot be used; the first: {broken}:1:" in done.stdout
    result = json.loads((tmp_path / "out" / "pilot.json").read_text())
    assert result["rejected"] == 1
    assert f"{broken}:1:" in result["first_reject"]
    # Another text under the same ids is another pilot.
    broken.write_text("\n".join(line.replace("Let me check", "Let us see") for line in lines) + "\n")
    done = forks.run(*arguments, "--seeds", 2, "--policies", "random", code=2)
    assert "are not what they were" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--policies", "chi3"), "--policy chi3: unknown"),
        (("--policies", "chi2, chi2"), "policies name one twice"),
        (("--dtype", "float16"), "dtype is one of auto, float32, bfloat16"),
        (("--held-out", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--policies", "", "--buckets", 0), "neither a policy nor a bucket"),
        (("--buckets", 1), "buckets is 0 for none or 2 to 20"),
        (("--seeds", 0), "seeds is at least 1"),
        (("--where", "nowhere"), "--where nowhere: no record of the pool has a column"),
        (("--held-out-where", "teacher=nobody"), "--held-out-where teacher=nobody: is so for no record"),
        (("--policies", "teacher,random"), "--policy teacher: needs --teacher-order"),
    ],
)
def test_bad_usage(tmp_path, pool, student, options, said, forks):
    done = forks.run(
        "pilot", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS, *options, code=2
    )
    assert said in done.stderr
    if said == "nowhere.jsonl":
        assert not (tmp_path / "out").exists()  # or the right command would be refused


def test_a_run_leaves_no_student_behind(tmp_path, pool, student, monkeypatch):
    # A GPU that holds one student with its moments need not hold two.
    students = []

    def load(*arguments, **settings):
        loaded = load_student(*arguments, **settings)
        students.append(weakref.ref(loaded.model))
        return loaded

    gc.disable()  # its time is not ours to choose
    monkeypatch.setattr("lark_fast.training.run.load_student", load)
    monkeypatch.setattr("lark_fast.training.run.matmul_ceiling", lambda *_: 1e12)
    pilot(
        PilotConfig(
            pool=(str(pool),),
            student=str(student),
            out=str(tmp_path / "out"),
            policies=("random",),
            seeds=2,
            buckets=0,
            tokens=300,
            global_batch=4,
            problems=4,
        ),
        say=lambda line: students.append(students[-1]() is None),
    )
    gc.enable()
    assert students[1::2] == [True, True]
