"""``lark-fast diagnose`` as people use it, on a tiny student: files, words, faults, and going on after a stop."""

import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import NO_CEILING, make_records, write_jsonl, write_student

OPTIONS = ("--problems", 9, "--budget", 2, "--steps", 1, "--lr", "1e-4")
FILES = ["diagnosis.md", "diagnosis.png", "manifest.json", "problems.jsonl", "summary.json"]


@pytest.fixture(scope="module")
def forks(forks):
    return forks.preceded_by(NO_CEILING)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    records = list(make_records(12, candidates=4))
    return write_jsonl(tmp_path_factory.mktemp("pool") / "pool.jsonl", records)


@pytest.fixture(scope="module")
def diagnosed(pool, student, tmp_path_factory, forks):
    out = tmp_path_factory.mktemp("diagnosed") / "out"
    done = forks.run("diagnose", "--pool", pool, "--student", student, "--out", out, *OPTIONS)
    return out, done


def lines_of(out):
    return [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]


def test_what_is_written(diagnosed):
    out, done = diagnosed
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == FILES
    lines = lines_of(out)
    assert len(lines) == 9
    for line in lines:
        assert set(line["weights"]) == {"full", "chi2", "topb", "random", "chi2 by lot"}
        for weights in line["weights"].values():
            assert sum(weights) == pytest.approx(1)
        # The same weights, dealt to others.
        assert sorted(line["weights"]["chi2"]) == pytest.approx(sorted(line["weights"]["chi2 by lot"]))
        assert line["stranger"]["problem_id"] != line["problem_id"]
        assert len(line["stranger"]["products"]) == len(line["gram"]) == 4
    summary = json.loads((out / "summary.json").read_text())
    assert summary["problems"] == 9
    assert summary["trajectories"] == 36
    assert summary["adamw"]["runs"] == summary["descent"]["runs"] == 9 * (4 + 5)
    # A step of 1 % is small enough for gradient flow to foretell it.
    assert summary["descent"]["ratio"]["mean"] == pytest.approx(1, abs=0.1)
    assert len(summary["paces"]) == 4
    assert all(sentence in done.stdout for sentence in summary["verdict"])
    assert "kappa" in summary["verdict"][0]
    assert "Does one number order" in (out / "diagnosis.md").read_text()
    assert (out / "diagnosis.png").stat().st_size > 10_000


def test_the_order_of_the_pool_does_not_matter(tmp_path, diagnosed, student, pool, forks):
    turned = write_jsonl(tmp_path / "pool.jsonl", [json.loads(line) for line in pool.read_text().splitlines()][::-1])
    forks.run("diagnose", "--pool", turned, "--student", student, "--out", tmp_path / "out", *OPTIONS)
    ours, theirs = ({line["problem_id"]: line for line in lines_of(out)} for out in (tmp_path / "out", diagnosed[0]))
    assert list(ours) == list(theirs)
    assert ours["3"]["nll"] == pytest.approx(theirs["3"]["nll"][::-1], rel=1e-5)


def test_it_goes_on_after_kill_9(tmp_path, diagnosed, student, pool, forks):
    arguments = ("diagnose", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS)
    started, path = forks.start(*arguments), tmp_path / "out" / "problems.jsonl"
    until = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > 2) and time.monotonic() < until:
        time.sleep(0.003)
    started.kill(signal.SIGKILL)
    started.wait()
    kept = path.read_bytes()
    assert 2 < kept.count(b"\n") < 9
    with open(path, "ab") as file:
        file.write(b'{"problem_id": "half a li')
    forks.run(*arguments)
    assert path.read_bytes().startswith(kept[: kept.rindex(b"\n")])
    ours, theirs = (json.loads((out / "summary.json").read_text()) for out in (tmp_path / "out", diagnosed[0]))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    again = forks.run(*arguments)
    assert "9 problems" in again.stdout


def test_another_diagnosis_in_the_same_place(diagnosed, student, pool, forks):
    out, _ = diagnosed
    other = forks.run(
        "diagnose", "--pool", pool, "--student", student, "--out", out, *OPTIONS, "--parameters", "lora", code=2
    )
    assert "was begun otherwise (parameters 'all' there, 'lora' now)" in other.stderr
    assert len(other.stderr.splitlines()[-1:]) == 1


@pytest.mark.parametrize("parameters", ["last-layer", "lora"])
def test_other_parameters(tmp_path, student, pool, parameters, forks):
    out = tmp_path / "out"
    forks.run(
        *("diagnose", "--pool", pool, "--student", student, "--out", out, "--parameters", parameters),
        *("--problems", 8, "--candidates", 2, "--budget", 2, "--top-k", 50),
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["parameters"] == parameters
    assert summary["trajectories"] == 16
    assert not summary["paces"]  # no problem has more candidates than the budget
    assert "nan" not in (out / "diagnosis.md").read_text().replace("tenant", "")


def test_a_pool_too_small_to_say_anything(tmp_path, student, forks):
    pool = write_jsonl(tmp_path / "pool.jsonl", list(make_records(3)))
    done = forks.run("diagnose", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS)
    assert "Too small to say anything: 3 problem(s)" in done.stdout
    assert "In all" not in done.stdout
    one = write_jsonl(tmp_path / "one.jsonl", list(make_records(1)))
    done = forks.run("diagnose", "--pool", one, "--student", student, "--out", tmp_path / "one", *OPTIONS)
    assert "Too small to say anything: 1 problem(s)" in done.stdout


def test_a_part_of_the_pool(tmp_path, student, pool, forks):
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    marked = write_jsonl(tmp_path / "pool.jsonl", [{**row, "good": row["candidate_id"] != 1} for row in rows])
    arguments = ("diagnose", "--pool", marked, "--student", student, *OPTIONS, "--problems", 8)
    done = forks.run(*arguments, "--out", tmp_path / "out", "--where", "good")
    assert "24 trajectories of 8 problems" in done.stdout
    assert all(one["candidate_id"] != "1" for line in lines_of(tmp_path / "out") for one in line["candidates"])
    done = forks.run(*arguments, "--out", tmp_path / "again", "--where", "teacher=nobody", code=2)
    assert "--where teacher=nobody: is so for no record" in done.stderr
    # What differs is said as it was given.
    done = forks.run(*arguments, "--out", tmp_path / "out", "--where", "good", "--problems", 9, code=2)
    assert "was begun otherwise (problems 8 there, 9 now" in done.stderr


def test_nothing_to_compare(tmp_path, student, forks):
    single = write_jsonl(tmp_path / "pool.jsonl", list(make_records(4, candidates=1)))
    done = forks.run("diagnose", "--pool", single, "--student", student, "--out", tmp_path / "out", *OPTIONS, code=2)
    assert "no problem has two candidates to compare" in done.stderr
    broken = write_jsonl(tmp_path / "broken.jsonl", [{"problem_id": 1, "messages": 5}])
    done = forks.run("diagnose", "--pool", broken, "--student", student, "--out", tmp_path / "out", *OPTIONS, code=2)
    assert "the first of 1 that cannot be used" in done.stderr
    assert "broken.jsonl:1:" in done.stderr


def test_a_step_at_which_the_loss_explodes(tmp_path, student, pool, forks):
    done = forks.run(
        *("diagnose", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS, "--lr", 50)
    )
    assert "AdamW at lr 50 is too large for this student: the loss rose, or was not finite, on" in done.stdout
    assert "Lower --lr" in done.stdout
    # What the gradients say stands.
    assert "the exact dR/dq" in done.stdout
    assert "a weighted loss falls over AdamW steps" not in done.stdout


def test_a_student_whose_loss_is_not_finite(tmp_path, pool, forks):
    student = write_student(tmp_path / "student")
    weights = load_file(student / "model.safetensors")
    weights["model.embed_tokens.weight"][4:] = torch.nan  # but for the words that a student is tried with
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    done = forks.run("diagnose", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS, code=2)
    assert "the student's loss or its gradient is not finite" in done.stderr
    assert "pool.jsonl:" in done.stderr
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_student_whose_gradients_are_not_finite(tmp_path, pool, forks):
    # Where the head sends errors back float32 overflows for some trajectories, though every loss is a number.
    student = write_student(tmp_path / "student")
    weights = load_file(student / "model.safetensors")
    weights["model.norm.weight"][:] = 1 / 3e38
    weights["lm_head.weight"][:] = 3e38
    for column in range(weights["lm_head.weight"].shape[1]):
        weights["lm_head.weight"][column % 4 :: 4, column] = -3e38
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    done = forks.run("diagnose", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    left_out = len(summary["not_finite"])
    assert 0 < left_out < 36
    assert summary["trajectories"] == 36 - left_out
    assert f"The loss or gradient of {left_out} trajectories is not finite" in done.stdout
    assert summary["not_finite"][0] in done.stdout
    # Nor can such a student take a step.
    assert "times as much off a loss as its gradient foretells" in done.stdout


def test_a_student_that_gives_no_numbers_at_all(tmp_path, pool, forks):
    student = write_student(tmp_path / "student")
    weights = load_file(student / "model.safetensors")
    weights["lm_head.weight"][7] = torch.nan
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    done = forks.run("diagnose", "--pool", pool, "--student", student, "--out", tmp_path / "out", *OPTIONS, code=2)
    assert "its logits are not numbers (NaN); look at its weights" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--problems", 0), "problems is at least 1"),
        (("--candidates", 1), "candidates is at least 2"),
        (("--lr", 0), "lr is a positive number"),
        (("--pool", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--student", "/nowhere"), "no such directory"),
    ],
)
def test_bad_usage(tmp_path, student, pool, options, said, forks):
    done = forks.run("diagnose", "--pool", pool, "--student", student, "--out", tmp_path / "out", *options, code=2)
    assert said in done.stderr
