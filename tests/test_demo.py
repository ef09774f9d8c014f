"""The demo on a small part of its problems: every step runs, and what it says follows from what it measured."""

import json
import math
import shlex

import numpy as np
import pytest

from lark_fast.demo.result import Outcome, Result, conclusion, difference, relative_fall, share
from lark_fast.demo.run import POLICIES
from lark_fast.demo.teachers import TEACHERS
from tests.command import run


def test_the_whole_path(tmp_path, capsys, forks):
    from lark_fast.demo.run import run_demo

    result = run_demo(tmp_path / "a demo", scale=0.02)
    assert [outcome.policy for outcome in result.outcomes] == list(POLICIES)
    for outcome in result.outcomes:
        assert outcome.rows == 16  # 8 problems, budget 2
        assert sum(outcome.teachers.values()) == pytest.approx(1)
        assert outcome.teachers.keys() == TEACHERS.keys()
        assert len(outcome.curve) == outcome.steps
        assert all(math.isfinite(loss) for loss in (*outcome.training, *outcome.held_out))
        assert (tmp_path / "a demo" / f"checkpoint-{outcome.policy}" / "model.safetensors").exists()
    assert (tmp_path / "a demo" / "gain.png").read_bytes().startswith(b"\x89PNG")
    assert 'class="text heat"' in (tmp_path / "a demo" / "report.html").read_text()
    # What it says to go on with can be run as it stands.
    said = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  lark-fast ")]
    assert [words[1] for words in said] == ["select", "eval"]
    for _, *words in said:
        forks.run(*words)
    assert json.loads((tmp_path / "a demo" / "evaluated" / "summary.json").read_text())


def test_it_never_writes_into_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "holds something else" in run("demo", "--out", tmp_path, code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def outcome(policy, held_out, solved):
    return Outcome(
        policy=policy,
        label=policy,
        rows=1,
        steps=1,
        tokens=1,
        teachers={},
        curve=(1.0,),
        training=(1.0, 0.5),
        held_out=held_out,
        solved=np.array(solved, dtype=bool),
    )


def test_the_words_follow_from_the_figures():
    few, many = [1] * 10 + [0] * 90, [1] * 60 + [0] * 40
    better = conclusion(
        Result(
            solved_before=np.array(few, dtype=bool),
            outcomes=[outcome("chi2", (1.0, 0.2), many), outcome("random", (1.0, 0.5), few)],
        )
    )
    assert "= 1.61, faster than random's (0.69)" in better
    assert "more than before (+50 ± 5 points) and than with random (+50 ± 5 points)" in better
    worse = conclusion(
        Result(
            solved_before=np.array(many, dtype=bool),
            outcomes=[outcome("chi2", (1.0, 0.9), few), outcome("random", (1.0, 0.5), few)],
        )
    )
    assert "= 0.11, no faster than random's (0.69)" in worse
    assert "fewer than before (-50 ± 5 points)" in worse
    assert "neither clearly more nor fewer than with random (+0 ± 0 points)" in worse


def test_measures():
    assert relative_fall((1.0, math.exp(-2))) == pytest.approx(2)
    assert share(np.array([True, False, False, False])) == pytest.approx((0.25, math.sqrt(0.25 * 0.75 / 4)))
    gap, error = difference(np.array([True, True, False, True]), np.array([False, True, False, True]))
    assert (gap, error) == pytest.approx((0.25, 0.25))
