"""``select --constraints``: what the command makes of a file; the mathematics has its own tests."""

import json

import numpy as np
import pytest

from lark_fast.errors import UserError
from lark_fast.selection.run import select, sweep
from tests.selections import RAGGED, Setup, read_lines


def write(tmp_path, text):
    path = tmp_path / "constraints.yaml"
    path.write_text(text)
    return str(path)


def test_a_constraint_that_does_not_bind_changes_nothing(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    free = setup.weights(budget=2)
    bound = setup.weights(budget=2, constraints=write(tmp_path, "budget: {tokens: 1.0e9}\n"))
    assert bound.keys() == free.keys()
    np.testing.assert_allclose([bound[key] for key in free], list(free.values()), rtol=1e-9)


def test_tokens_and_shares_hold(tmp_path):
    problems = {n: list(np.random.default_rng(n).normal(size=6)) for n in range(40)}
    setup = Setup(tmp_path, problems)
    lines = setup.select(budget=2)[1]
    tokens = {(row["problem_id"], row["candidate_id"]): row["n_tokens"] for row in setup.rows}

    def used(lines):
        keys = [(str(line["meta"]["problem_id"]), str(line["meta"]["candidate_id"])) for line in lines]
        return sum(line["weight"] * tokens[key] for line, key in zip(lines, keys, strict=True))

    limit = 0.9 * used(lines)
    text = (
        f"budget: {{tokens: {limit}}}\ngroups:\n  teacher:\n    alpha: {{max: 0.3}}\n  level:\n    5: {{min: 0.25}}\n"
    )
    summary, lines = setup.select(budget=2, constraints=write(tmp_path, text))
    assert used(lines) <= limit * (1 + 1e-6)
    weight = {"alpha": 0.0, 5: 0.0}
    for line in lines:
        weight["alpha"] += line["weight"] * (line["meta"]["teacher"] == "alpha")
        weight[5] += line["weight"] * (line["level"] == 5)
    assert weight["alpha"] <= 0.3 * 40 * (1 + 1e-6)
    assert weight[5] >= 0.25 * 40 * (1 - 1e-6)
    assert summary.notes
    assert any("tokens" in line for line in summary.lines())


def test_a_column_of_the_pool_needs_the_pool(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    path = write(tmp_path, "groups:\n  level:\n    0: {max: 0.5}\n")
    with pytest.raises(UserError, match=r"constraints\.yaml: level is a column of the pool: give --pool too"):
        select(setup.config(pool=(), constraints=path))
    assert not setup.out.exists()


def test_what_cannot_hold_is_an_error_and_writes_nothing(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    path = write(tmp_path, "groups:\n  teacher:\n    alpha: {max: 0.3}\n    beta: {max: 0.4}\n")
    with pytest.raises(UserError) as caught:
        setup.select(constraints=path)
    assert "alpha" in str(caught.value)
    assert "beta" in str(caught.value)
    assert not (setup.out / "train.jsonl").exists()


@pytest.mark.parametrize(("rows", "tau"), [(100, float), (10**6, str)])
def test_rows_over_all_problems(tmp_path, rows, tau):
    setup = Setup(tmp_path, {n: list(np.random.default_rng(n).normal(size=6)) for n in range(40)})
    summary, lines = setup.select(constraints=write(tmp_path, f"budget: {{rows: {rows}}}\n"))
    assert len(lines) == summary.rows == min(rows, 240)
    assert any(line.startswith("budget.rows: ") and "tau" in line for line in summary.lines())
    told = json.loads((setup.out / "manifest.json").read_text())["constraints"]
    assert told["solver"] == "closed form"
    assert isinstance(told["tau"], tau)


def test_sizes_are_of_each_problems_own_weights(tmp_path):
    setup = Setup(tmp_path, {n: list(np.random.default_rng(n).normal(size=6)) for n in range(40)})
    summary, lines = setup.select(tau=0.1, constraints=write(tmp_path, "budget: {samples: 5.5}\n"))
    assert sum(line["weight"] for line in lines) == pytest.approx(5.5)
    assert 1 <= summary.mean_effective_sample_size <= 6


def test_a_share_of_a_column_that_nobody_has(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    with pytest.raises(UserError, match=r"groups\.nope: no candidate has any nope"):
        setup.select(constraints=write(tmp_path, 'groups: {nope: {"*": {max: 0.5}}}\n'))


def test_a_sweep_under_constraints(tmp_path):
    setup = Setup(tmp_path, {n: list(np.random.default_rng(n).normal(size=6)) for n in range(10)})
    path = write(tmp_path, "groups:\n  teacher:\n    alpha: {max: 0.4}\n")
    summaries, _ = sweep(setup.config(constraints=path, sweep=("budget=1,2,3",)))
    for name, summary in summaries.items():
        assert summary.teachers["alpha"]["weight"] <= 0.4 + 1e-9
        assert len(read_lines(setup.out / name / "train.jsonl")) == summary.rows
