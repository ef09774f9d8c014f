"""Selections from stored scores alone, many at a time, and what their comparison says; and filters before them."""

import json
import math
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest

from lark_fast.errors import UserError
from lark_fast.scoring.learnability import g_hat
from lark_fast.selection.run import select, sweep
from tests.command import run
from tests.selections import RAGGED, Setup, raw, read_lines, score_row, write_pool, write_scores

NAN = math.nan
AXES = ("budget=1,2,4", "policy=chi2,rsr,random")


def weights_of(directory):
    table = pq.read_table(directory / "weights.parquet").to_pylist()
    return {(row["problem_id"], row["candidate_id"]): row["weight"] for row in table}


def test_without_a_pool_there_are_weights_alone(tmp_path):
    setup = Setup(tmp_path, RAGGED, parts=3)
    lines = setup.select(budget=3)[1]
    expected = {(str(row["meta"]["problem_id"]), str(row["meta"]["candidate_id"])): row["weight"] for row in lines}
    assert weights_of(setup.out) == expected
    alone = setup.config(pool=(), out=str(tmp_path / "alone"), budget=3)
    summary = select(alone)
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"weights.parquet", "manifest.json"}
    assert weights_of(tmp_path / "alone") == expected
    assert (summary.rows, summary.pool_records) == (len(lines), 0)
    table = pq.read_table(tmp_path / "alone" / "weights.parquet").to_pylist()
    assert [row["g_hat"] for row in table] == [line["meta"]["g_hat"] for line in lines]
    assert [row["teacher"] for row in table] == [line["meta"]["teacher"] for line in lines]
    with pytest.raises(UserError, match="holds a selection already"):
        select(alone)


def test_nothing_of_an_earlier_selection_is_left_beside_a_new_one(tmp_path):
    setup = Judged(tmp_path).setup
    setup.select(export=("llama-factory", "trl"), where=("correct",))
    assert len([path for path in setup.out.rglob("*") if path.is_file()]) == 7
    setup.select(export=("trl",))
    found = {str(path.relative_to(setup.out)) for path in setup.out.rglob("*") if path.is_file()}
    assert found == {"train.jsonl", "weights.parquet", "manifest.json", "trl/train.jsonl"}
    setup.select(export=("trl",), policy="perplexity", band=(1e6, 2e6))
    assert not (setup.out / "trl" / "train.jsonl").exists()
    sweep(setup.config(sweep=("budget=1,2",), overwrite=True))
    sweep(setup.config(sweep=("budget=2,3",), overwrite=True))
    names = {path.name for path in setup.out.iterdir()}
    assert names == {"budget=2", "budget=3", "comparison.json", "comparison.md"}
    select(setup.config(pool=(), overwrite=True))
    assert {path.name for path in setup.out.rglob("*") if path.is_file()} == {"weights.parquet", "manifest.json"}


@pytest.mark.parametrize("with_pool", [False, True])
def test_a_sweep_is_its_selections_side_by_side(tmp_path, with_pool):
    setup = Setup(tmp_path, RAGGED)
    pool = {} if with_pool else {"pool": ()}
    summaries, tables = sweep(setup.config(sweep=AXES, **pool))
    assert len(summaries) == 9
    compared = json.loads((setup.out / "comparison.json").read_text())
    chosen = {}
    for budget in (1, 2, 4):
        for policy in ("chi2", "rsr", "random"):
            name = f"budget={budget}-policy={policy}"
            single = Setup(tmp_path / name, RAGGED) if (tmp_path / name).mkdir() is None else None
            summary, lines = single.select(budget=budget, policy=policy)
            assert weights_of(setup.out / name) == weights_of(single.out)
            assert (setup.out / name / "train.jsonl").exists() == with_pool
            if with_pool:
                assert read_lines(setup.out / name / "train.jsonl") == lines
            facts = compared["selections"][name]
            assert facts["rows"] == summary.rows == sum(facts["weight_histogram"])
            assert facts["tokens"] == summary.selected_tokens
            assert facts["mean_effective_sample_size"] == summary.mean_effective_sample_size
            assert facts["teachers"] == {teacher: shares["weight"] for teacher, shares in summary.teachers.items()}
            bins = pairwise(compared["weight_histogram_edges"])
            counts = [sum(low < line["weight"] <= high for line in lines) for low, high in bins]
            assert facts["weight_histogram"] == counts
            chosen[name] = set(weights_of(single.out))
            assert f" {name} " in tables
            manifest = json.loads((setup.out / name / "manifest.json").read_text())
            assert (manifest["config"]["budget"], manifest["config"]["policy"]) == (budget, policy)
    for a in chosen:
        for b in chosen:
            assert compared["jaccard"][a][b] == pytest.approx(len(chosen[a] & chosen[b]) / len(chosen[a] | chosen[b]))
    assert (setup.out / "comparison.md").read_text() == tables


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("size=1,2",), "--sweep size=1,2: is no KEY=VALUE,VALUE,... of budget, tau, policy"),
        (("budget",), "--sweep budget: is no KEY"),
        (("budget=1", "budget=2"), "--sweep budget=2: comes twice"),
        (("budget=1,x",), "'x' is no number"),
        (("budget=1,1",), "names a value twice"),
        (("budget=0",), "--budget 0"),
        (("policy=chi2,best",), "--policy best: unknown"),
        (("tau=0.1", "policy=topb"), "--tau: only"),
        (("budget=1,2", "tau=0.1"), "--budget and --tau"),
        (("seed=1,2", "policy=chi2"), "--sweep seed: is for the policy random or perplexity only"),
        (("seed=" + ",".join(map(str, range(101))),), "101 combinations"),
    ],
)
def test_bad_sweeps_write_nothing(tmp_path, axes, message):
    setup = Setup(tmp_path, RAGGED)
    with pytest.raises(UserError) as caught:
        sweep(setup.config(sweep=axes))
    assert message in str(caught.value)
    assert not setup.out.exists()


def test_sweep_through_the_command_line(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    words = ("select", "--scores", setup.scores, "--out", setup.out)
    done = run(*words, "--sweep", "budget=1,2", "policy=chi2,kl,nll")
    assert "| overlap (Jaccard)" in done.stdout
    assert "6 selection(s) side by side" in done.stdout
    assert len(list(setup.out.glob("*/weights.parquet"))) == 6
    assert "one needs the other" in run(*words, "budget=1,2", code=2).stderr
    assert "LOW:HIGH" in run(*words, "--policy", "perplexity", "--band", "3", code=2).stderr


class Judged:
    """A pool in which records are judged, and scores whose g_hat is that of their nll and Brier score."""

    def __init__(self, tmp_path, problems=6, candidates=5):
        rng = np.random.default_rng(0)
        self.raws = [
            raw(p, k, correct=bool((p + k) % 3), level="hard" if p % 2 else "easy", score=k)
            for p in range(problems)
            for k in range(candidates)
        ]
        self.nll, self.brier = rng.uniform(0.1, 2, (2, len(self.raws)))
        problem = np.arange(len(self.raws)) // candidates
        self.g_hat = g_hat(self.nll, self.brier, problem)
        rows = [
            score_row(row, float(g), nll=float(n), brier=float(b))
            for row, g, n, b in zip(self.raws, self.g_hat, self.nll, self.brier, strict=True)
        ]
        self.setup = Setup.__new__(Setup)
        self.setup.raws, self.setup.rows, self.setup.out = self.raws, rows, tmp_path / "selection"
        self.setup.pool = write_pool(tmp_path / "pool.jsonl", self.raws)
        self.setup.scores = write_scores(tmp_path / "scores", rows)


def test_where_selects_as_if_the_others_had_never_been(tmp_path):
    judged = Judged(tmp_path)
    kept = [i for i, row in enumerate(judged.raws) if row["correct"]]
    problem = np.array([judged.raws[i]["problem_id"] for i in kept])
    expected = g_hat(judged.nll[kept], judged.brier[kept], problem)
    summary, lines = judged.setup.select(where=("correct",), budget=2)
    by_key = {
        (judged.raws[i]["problem_id"], judged.raws[i]["candidate_id"]): e for i, e in zip(kept, expected, strict=True)
    }
    assert lines
    for line in lines:
        assert line["meta"]["g_hat"] == pytest.approx(by_key[line["meta"]["problem_id"], line["meta"]["candidate_id"]])
    for p in range(6):
        own = sorted((e for key, e in by_key.items() if key[0] == p), reverse=True)
        chosen = [line["meta"]["g_hat"] for line in lines if line["meta"]["problem_id"] == p]
        np.testing.assert_allclose(sorted(chosen, reverse=True), own[:2], rtol=1e-12)
    assert summary.removed == {"--where correct": 10}
    assert "10 trajectories removed: --where correct" in summary.lines()
    removed = read_lines(judged.setup.out / "removed.jsonl")
    assert [(row["problem_id"], row["candidate_id"]) for row in removed] == [
        (row["problem_id"], row["candidate_id"]) for row in judged.raws if not row["correct"]
    ]
    assert {row["reason"] for row in removed} == {"--where correct"}


def test_conditions_all_have_to_hold(tmp_path):
    setup = Judged(tmp_path).setup
    summary, lines = setup.select(where=("level=hard", "correct=true", "teacher=alpha"), budget=5)
    assert {(line["level"], line["correct"]) for line in lines} == {("hard", True)}
    assert list(summary.removed.values()) == [15, 5, 0]
    assert summary.problems_without_row == 3
    with pytest.raises(UserError, match="no record of the pool has a column 'judged'"):
        setup.select(where=("judged",))
    with pytest.raises(UserError, match=r"pool\.jsonl:1: level is 'easy', neither true nor false; say --where level="):
        setup.select(where=("level",))
    with pytest.raises(UserError, match="--where level=none: is so for no record; level is 'easy', 'hard'"):
        setup.select(where=("level=none",))
    with pytest.raises(UserError, match=r"correct took 10, --where level=hard took 10, .* took 10: nothing is left"):
        setup.select(where=("correct", "correct", "level=hard", "problem_id=0"))
    assert summary.rows == len(lines) > 0


def test_near_duplicates_and_contaminated_problems_go_before_the_selection(tmp_path):
    judged = Judged(tmp_path)
    for i in (1, 6):  # candidate 1 of problems 0 and 1 says what candidate 0 does, in other spacing
        turns = judged.raws[i - 1]["messages"]
        judged.raws[i]["messages"] = [
            turns[0],
            {"role": "assistant", "content": turns[1]["content"].replace(" ", "  ")},
        ]
    rows = [
        row | {"content_hash": score_row(r, 0.0)["content_hash"]}
        for row, r in zip(judged.setup.rows, judged.raws, strict=True)
    ]
    write_pool(judged.setup.pool, judged.raws)
    write_scores(judged.setup.scores, rows)
    benchmark = write_pool(tmp_path / "benchmark.jsonl", [{"question": "Question 1?"}])
    summary, lines = judged.setup.select(near_duplicates="exact", decontaminate=(str(benchmark),), budget=9)
    keys = {(line["meta"]["problem_id"], line["meta"]["candidate_id"]) for line in lines}
    assert not any(problem == 1 for problem, _ in keys)
    better = 0 if judged.g_hat[0] >= judged.g_hat[1] else 1
    assert (0, better) in keys
    assert (0, 1 - better) not in keys
    assert len(keys) == 30 - 5 - 1
    assert sorted(summary.removed.values()) == [1, 5]
    assert len(read_lines(judged.setup.out / "removed.jsonl")) == 6
