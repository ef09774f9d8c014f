"""Each policy against its rule, stated one problem at a time; and what is asked of one's own."""

import json
import math

import numpy as np
import pytest

from lark_fast.errors import UserError
from lark_fast.selection.policies import POLICIES, PolicyOptions, find_policy
from tests.selections import RAGGED, Setup

NAN = math.nan


def own_rows(setup, problem):
    return [row for row in setup.rows if row["problem_id"] == str(problem)]


@pytest.mark.parametrize(
    ("policy", "column", "sign"),
    [
        ("topb", "g_hat", -1),
        ("nll", "nll", 1),
        ("rsr", "rsr", 1),
        ("entropy", "entropy", -1),
        ("rho", "rho", -1),
        ("brier", "brier", -1),
        ("shortest", "n_tokens", 1),
        ("longest", "n_tokens", -1),
    ],
)
def test_policies_that_take_the_best_by_a_column_alike(tmp_path, policy, column, sign):
    setup = Setup(tmp_path, RAGGED)
    weights = setup.weights(policy=policy, budget=4)
    for problem, energies in RAGGED.items():
        own = own_rows(setup, problem)
        best = sorted(range(len(own)), key=lambda k: sign * own[k][column])[:4]
        expected = {(problem, k): 1 / min(4, len(energies)) for k in best}
        assert {key: q for key, q in weights.items() if key[0] == problem} == expected


def softmax(values, tau):
    powers = [math.exp((value - max(values)) / tau) for value in values]
    return [power / sum(powers) for power in powers]


def test_kl_with_a_tau_is_a_softmax_over_all(tmp_path):
    setup = Setup(tmp_path, RAGGED | {"part": [0.3, NAN, 0.1]})
    weights = setup.weights(policy="kl", tau=0.5)
    for problem, energies in RAGGED.items():
        expected = softmax(energies, 0.5)
        np.testing.assert_allclose([weights[problem, k] for k in range(len(energies))], expected, rtol=1e-12)
    np.testing.assert_allclose([weights["part", k] for k in (0, 2)], softmax([0.3, 0.1], 0.5), rtol=1e-12)


def test_kl_with_tau_and_budget_is_a_softmax_over_the_best(tmp_path):
    weights = Setup(tmp_path, RAGGED).weights(policy="kl", tau=0.5, budget=3)
    for problem, energies in RAGGED.items():
        best = sorted(range(len(energies)), key=lambda k: -energies[k])[:3]
        found = {key[1]: q for key, q in weights.items() if key[0] == problem}
        assert sorted(found) == sorted(best)
        np.testing.assert_allclose([found[k] for k in best], softmax([energies[k] for k in best], 0.5), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_kl_with_a_budget_has_that_perplexity(scale):
    energies = (
        np.array([RAGGED["many"], [1.0, 1.0, 1.0, 1.0] + [0.0] * 33, [0.5, 0.1] + [NAN] * 35, [2.0] * 37]) * scale
    )
    weights, _ = POLICIES["kl"].weigh({"g_hat": energies}, PolicyOptions(budget=3))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(axis=1)
    assert math.exp(entropy[0]) == pytest.approx(3, rel=1e-9)
    assert np.all(np.diff(weights[0][np.argsort(-energies[0])]) <= 0)
    # Four that tie for the best cannot have a perplexity of 3.
    np.testing.assert_allclose(weights[1], [0.25] * 4 + [0] * 33, atol=1e-9)
    np.testing.assert_array_equal(weights[2], [0.5, 0.5] + [0] * 35)
    np.testing.assert_allclose(weights[3], np.full(37, 1 / 37), rtol=1e-12)


def test_perplexity_draws_from_its_band(tmp_path):
    setup = Setup(tmp_path, {n: list(np.linspace(0, 1, 12)) for n in range(60)})
    inside = {
        (int(row["problem_id"]), int(row["candidate_id"])) for row in setup.rows if 1.5 <= math.exp(row["nll"]) <= 2.5
    }
    first = setup.weights(policy="perplexity", band=(1.5, 2.5), budget=2)
    assert set(first) <= inside
    for problem in range(60):
        available = sum(key[0] == problem for key in inside)
        found = [q for key, q in first.items() if key[0] == problem]
        assert found == {0: [], 1: [1.0]}.get(available, [0.5, 0.5])
    assert first == setup.weights(policy="perplexity", band=(1.5, 2.5), budget=2)
    assert first != setup.weights(policy="perplexity", band=(1.5, 2.5), budget=2, seed=1)
    # By default the middle half of the pool.
    low, high = np.quantile([row["nll"] for row in setup.rows], (0.25, 0.75))
    default = setup.weights(policy="perplexity", budget=100)
    nll = {(int(row["problem_id"]), int(row["candidate_id"])): row["nll"] for row in setup.rows}
    assert all(low <= nll[key] <= high for key in default)
    assert len(default) == 360


def test_problems_that_are_kept_whole_are_those_alone(tmp_path):
    setup = Setup(tmp_path, {1: [0.1, 0.2], 2: [0.1, 0.2, 0.3], 3: [0.5]})
    assert setup.select(budget=2)[0].problems_kept_whole == 2
    none = setup.select(policy="perplexity", band=(1e6, 2e6), budget=9)[0]
    assert (none.problems_kept_whole, none.rows, none.problems_without_row) == (0, 0, 3)


def test_teacher_takes_candidates_of_the_first_teachers(tmp_path):
    setup = Setup(tmp_path, {1: [0.0, 3.0, 1.0, 2.0], 2: [5.0, 4.0]})  # teachers alpha and beta in turn
    weights = setup.weights(policy="teacher", teacher_order=("beta", "alpha"), budget=3)
    assert weights == {(1, 1): 1 / 3, (1, 3): 1 / 3, (1, 0): 1 / 3, (2, 0): 0.5, (2, 1): 0.5}
    assert set(setup.weights(policy="teacher", teacher_order=("beta",), budget=1)) == {(1, 1), (2, 1)}
    with pytest.raises(UserError, match="no trajectory is by 'gamma'; there are 'alpha', 'beta'"):
        setup.select(policy="teacher", teacher_order=("gamma", "beta"))


def test_what_was_not_scored_cannot_be_selected_by(tmp_path):
    setup = Setup(tmp_path, RAGGED)
    with pytest.raises(UserError, match=r"has no column local_step_nll; .* --local-steps"):
        setup.select(policy="local")
    with pytest.raises(UserError, match=r"has no column rho_measured; .* --before and --after"):
        setup.select(policy="measured")


OWN = """
import numpy as np

def by_entropy(columns, options):
    assert set(columns) >= {"g_hat", "nll", "brier", "rsr", "n_tokens", "random"}
    return np.where(columns["entropy"] > 0.5, columns["entropy"] * options.size, 0.0)

def wrong_shape(columns, options):
    return columns["nll"][:, :-1]

def negative(columns, options):
    return -columns["nll"]

def raising(columns, options):
    return columns["absent"]

def leaving(columns, options):
    raise SystemExit(0)

def text(columns, options):
    return "all of them"

def huge_and_meddling(columns, options):
    g_hat = columns["g_hat"]
    g_hat[np.isnan(g_hat)] = 0
    return np.full(g_hat.shape, 1e308)

def by_tau(columns, options):
    assert (options.tau, options.budget) == (0.5, 2)
    return (columns["teacher_rank"] == 0) * options.tau

nothing = 3
"""


def test_ones_own_policy(tmp_path, monkeypatch):
    (tmp_path / "my_policies.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    setup = Setup(tmp_path, RAGGED)
    weights = setup.weights(policy="my_policies:by_entropy", budget=2)
    for problem in RAGGED:
        own = own_rows(setup, problem)
        total = sum(row["entropy"] for row in own if row["entropy"] > 0.5)
        expected = {(problem, k): row["entropy"] / total for k, row in enumerate(own) if row["entropy"] > 0.5}
        found = {key: q for key, q in weights.items() if key[0] == problem}
        assert found == pytest.approx(expected, rel=1e-12)
    by_tau = setup.weights(policy="my_policies:by_tau", tau=0.5, budget=2, teacher_order=("beta", "alpha"))
    assert {key[1] for key in by_tau} <= {k for k in range(37) if k % 2}  # beta's
    alike = setup.weights(policy="my_policies:huge_and_meddling")
    expected = {(problem, k): pytest.approx(1 / len(own)) for problem, own in RAGGED.items() for k in range(len(own))}
    assert alike == expected
    for name, message in [
        ("my_policies:wrong_shape", r"returned the shape \(\d+, \d+\) where"),
        ("my_policies:negative", "returned weights that are negative, infinite, complex or NaN"),
        ("my_policies:nothing", "is no function"),
        ("my_policies:raising", r"failed \(KeyError: 'absent'\)"),
        ("my_policies:leaving", r"failed \(SystemExit: 0\)"),
        ("my_policies:text", r"failed \(ValueError: "),
        ("os:getcwd", r"failed \(TypeError: "),
        ("my_policies:absent", "cannot be imported"),
        ("absent_module:f", r"cannot be imported \(ModuleNotFoundError"),
        ("best", "unknown; known are chi2"),
    ]:
        with pytest.raises(UserError, match=f"--policy {name}: {message}"):
            setup.select(policy=name)


def test_every_policy_has_a_rule_here(tmp_path):
    """A policy by a name of its own is tested above; this is for the one that is added."""
    setup = Setup(tmp_path, RAGGED)
    extra = {"teacher": {"teacher_order": ("beta",)}}
    for policy in POLICIES.keys() - {"local", "measured"}:
        summary, lines = setup.select(policy=policy, **extra.get(policy, {}))
        assert summary.rows == len(lines) > 0
        totals = {}
        for line in lines:
            totals[line["meta"]["problem_id"]] = totals.get(line["meta"]["problem_id"], 0) + line["weight"]
        np.testing.assert_allclose(list(totals.values()), 1, rtol=1e-12)
        assert find_policy(policy) is POLICIES[policy]
        assert json.loads((setup.out / "manifest.json").read_text())["config"]["policy"] == policy
