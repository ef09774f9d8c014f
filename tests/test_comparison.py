"""Evaluations side by side: measures, tables, and differences on the problems that both have."""

import csv
import itertools
import json

import numpy as np
import pytest

from lark_fast.errors import UserError
from lark_fast.evaluation.comparison import compare
from lark_fast.evaluation.measures import acc_at_k, measure
from lark_fast.evaluation.results import write_results
from lark_fast.intervals import mean_interval, paired_difference


def drawn(seed, rate, n=5, problems=40, benchmark="math", **fields):
    """Lines of problems.jsonl."""
    draws = np.random.default_rng(seed)
    lines = []
    for number in range(problems):
        correct = (draws.random(n) < rate).tolist()
        answers = [{"answer": "7", "correct": ok, "fault": "", "tokens": 9, "finish": "stop"} for ok in correct]
        line = {"benchmark": benchmark, "problem_id": str(number), "kind": "math", "group": str(1 + number % 5)}
        majority = {"answer": "7", "correct": sum(correct) > n / 2}
        lines.append(line | {"gold": "1", "answers": answers, "correct": correct, "majority": majority} | fields)
    return lines


def run(directory, lines, model="student"):
    directory.mkdir(parents=True)
    found = {}
    for name in dict.fromkeys(line["benchmark"] for line in lines):
        own = [line for line in lines if line["benchmark"] == name]
        correct = np.array([line["correct"] for line in own])
        found[name] = measure(
            correct,
            [line["majority"]["correct"] for line in own],
            unanswered=np.zeros_like(correct),
            cut=np.zeros_like(correct),
            tokens=np.full(correct.shape, 9),
            groups=[line["group"] for line in own],
        ).as_json()
    write_results(directory, lines, {"model": model, "settings": {}, "benchmarks": found})
    return str(directory)


def compared(tmp_path, *runs):
    said = compare([str(one) for one in runs], str(tmp_path / "out"))
    return said, json.loads((tmp_path / "out" / "comparison.json").read_text())


@pytest.mark.parametrize("n", [1, 4, 6])
def test_acc_at_k_is_the_mean_over_all_draws(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        answers = [True] * right + [False] * (n - right)
        draws = list(itertools.combinations(answers, k))
        expected = sum(any(draw) for draw in draws) / len(draws)
        assert acc_at_k([answers], k)[0] == pytest.approx(expected, abs=1e-14)


def test_measures_are_means_over_problems():
    correct = np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=bool)
    found = measure(
        correct,
        [True, False, True, False],
        unanswered=~correct,
        cut=correct,
        tokens=np.arange(20).reshape(4, 5),
        groups=["10", "9", "9", "10"],
    )
    assert (found.problems, found.n) == (4, 5)
    assert found.acc_1 == mean_interval([0.4, 0, 1, 0.2])
    assert found.acc_n == mean_interval([1, 0, 1, 1])
    assert found.majority == mean_interval([1, 0, 1, 0])
    assert found.acc_k[1] == pytest.approx((0.7 + 0 + 1 + 0.4) / 4)
    assert list(found.groups) == ["9", "10"]
    assert found.groups["9"].acc_1 == mean_interval([0, 1])
    assert (found.unanswered, found.cut, found.tokens) == pytest.approx((0.6, 0.4, 9.5))


def test_differences_are_of_the_problems_that_both_have(tmp_path):
    before, after = drawn(0, 0.3), drawn(1, 0.6)
    first = run(tmp_path / "before", [*before, *drawn(2, 0.5, benchmark="aime", problems=10)])
    second = run(tmp_path / "after", [*after[2:], {**after[0], "problem_id": "99"}])
    said, found = compared(tmp_path, first, second)
    differences = found["differences"]
    assert [(one["benchmark"], one["measure"], one["k"]) for one in differences] == [
        ("math", "acc_1", 5),
        ("math", "acc_k", 5),
        ("math", "majority", 5),
    ]
    ours, theirs = ([np.mean(line["correct"]) for line in lines[2:]] for lines in (after, before))
    expected = paired_difference(ours, theirs)
    assert differences[0]["p_value"] == pytest.approx(expected.p_value)
    assert differences[0]["difference"]["low"] == pytest.approx(expected.difference.low)
    # Two that the second lacks, one that the first lacks.
    assert all((one["problems"], one["left_out"]) == (38, 3) for one in differences)
    assert "on 38 problems" in said[0]
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["benchmark"], row["group"]) for row in rows] == [
        (name, benchmark, group)
        for name, benchmark in ((first, "math"), (first, "aime"), (second, "math"))
        for group in ("", "1", "2", "3", "4", "5")
    ]


def test_runs_of_different_n_are_compared_at_one_k(tmp_path):
    few, many = drawn(0, 0.4, n=2), drawn(1, 0.4, n=8)
    said, found = compared(tmp_path, run(tmp_path / "few", few), run(tmp_path / "many", many))
    acc_1, acc_k, majority = found["differences"]
    assert [one["measure"] for one in (acc_1, acc_k, majority)] == ["acc_1", "acc_k", "majority"]
    expected = np.mean(acc_at_k([line["correct"] for line in many], 2)) - np.mean([any(a["correct"]) for a in few])
    assert acc_k["k"] == 2
    assert acc_k["difference"]["mean"] == pytest.approx(expected)
    assert "ACC@2" in said[1]
    single = [run(tmp_path / name, drawn(seed, 0.5, n=1)) for seed, name in enumerate("ab")]
    compare(single, str(tmp_path / "single"))
    found = json.loads((tmp_path / "single" / "comparison.json").read_text())
    assert [one["measure"] for one in found["differences"]] == ["acc_1"]


def test_names_from_outside_are_text(tmp_path):
    evil = "=HYPERLINK(1)|<b>`x`\n[a](http://b)\x1b[31m\u202e"
    runs = [run(tmp_path / name, drawn(0, 0.5, benchmark=evil), model="-1+1") for name in ("a|b", "c")]
    said, _ = compared(tmp_path, *runs)
    assert all(line.isprintable() for line in said)
    table = (tmp_path / "out" / "comparison.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert {row["model"] for row in rows} == {"'-1+1"}
    assert {row["benchmark"] for row in rows} == {"'" + r"=HYPERLINK(1)|<b>`x`\x0a[a](http://b)\x1b[31m\u202e"}
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert r"=HYPERLINK(1)\|\<b\>\`x\`\\x0a\[a\](http://b)\\x1b\[31m\\u202e" in text
    assert all(mark not in text + table for mark in "\x1b\u202e")


def test_what_cannot_be_compared(tmp_path):
    a, b = run(tmp_path / "a", drawn(0, 0.5)), run(tmp_path / "b", drawn(0, 0.5, gold="2"))
    out = str(tmp_path / "out")
    for told, runs, where in (
        ("two or more", [a], out),
        ("twice", [a, str(tmp_path / "b" / ".." / "a")], out),
        ("has the answer '2', in .* '1'", [a, b], out),
        ("has no problem that", [a, run(tmp_path / "c", drawn(0, 0.5, benchmark="aime"))], out),
        ("no summary.json there", [a, str(tmp_path / "d")], out),
        ("holds the evaluation", [a, b], a),
        ("lies in the evaluation", [a, b], f"{a}/out"),
    ):
        with pytest.raises(UserError, match=told):
            compare(runs, where)
    assert not (tmp_path / "out").exists()
    compare([a, run(tmp_path / "e", drawn(1, 0.5))], out)
    with pytest.raises(UserError, match="--overwrite"):
        compare([a, str(tmp_path / "e")], out)
