"""How approximate scores are compared with exact ones: by hand, and at the edges."""

import json
import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from lark_fast.kernels.chi2 import chi2_weights
from lark_fast.scoring.agreement import Scores, agreement
from lark_fast.scoring.learnability import g_hat


def some_scores(problems=40, seed=0):
    """Problems of 2 to 8 candidates, in no order."""
    rng = np.random.default_rng(seed)
    names = np.array([f"p{i}" for i in range(problems)])
    problem = rng.permutation(np.repeat(names, rng.integers(2, 9, problems)))
    return Scores(rng.uniform(0.1, 2, len(problem)), rng.uniform(0.05, 1, len(problem))), problem


def noisy(scores, size, seed=1):
    rng = np.random.default_rng(seed)
    return Scores(*(column * np.exp(size * rng.normal(size=len(column))) for column in scores))


def test_equal_scores_agree():
    scores, problem = some_scores()
    found = agreement(scores, scores, problem)
    assert found.nll.spearman == pytest.approx(1) == found.g_hat.spearman == found.g_hat_within
    assert found.brier.largest_error == found.g_hat.rms_error == found.total_variation == 0
    assert (found.same_top, found.lost, found.trajectories) == (1, 0, len(problem))
    assert found.nll.rms == pytest.approx(np.sqrt((scores.nll**2).mean()))


def test_every_number_against_its_definition():
    """A problem at a time, by other functions: scipy's Spearman, padded chi2 weights."""
    exact, problem = some_scores()
    near = noisy(exact, 0.1)
    found = agreement(exact, near, problem, budget=2)
    ours, theirs = g_hat(*near, problem), g_hat(*exact, problem)
    for name, a, b in (("nll", exact.nll, near.nll), ("brier", exact.brier, near.brier), ("g_hat", theirs, ours)):
        close = getattr(found, name)
        assert close.spearman == pytest.approx(spearmanr(a, b).statistic)
        assert close.largest_error == pytest.approx(np.abs(a - b).max())
        assert close.rms_error == pytest.approx(np.sqrt(((a - b) ** 2).mean()))
    same, apart, within = [], [], []
    for name in np.unique(problem):
        a, b = theirs[problem == name], ours[problem == name]
        within.append(spearmanr(a, b).statistic)
        if len(a) > 2:
            same.append(set(np.argsort(a)[-2:]) == set(np.argsort(b)[-2:]))
            apart.append(np.abs(chi2_weights(a, 2) - chi2_weights(b, 2)).sum() / 2)
    assert found.problems == len(same) < len(np.unique(problem))
    assert found.same_top == pytest.approx(np.mean(same))
    assert 0 < found.same_top < 1
    assert found.total_variation == pytest.approx(np.mean(apart))
    assert found.largest_total_variation == pytest.approx(max(apart))
    assert found.g_hat_within == pytest.approx(np.mean(within))


def test_order_and_names_do_not_matter():
    exact, problem = some_scores()
    near = noisy(exact, 0.1)
    shuffle = np.random.default_rng(2).permutation(len(problem))
    numbers = np.unique(problem, return_inverse=True)[1]
    one = agreement(exact, near, problem).as_json()
    other = agreement(*(Scores(*(c[shuffle] for c in scores)) for scores in (exact, near)), numbers[shuffle]).as_json()
    for name, value in one.items():
        assert other[name] == pytest.approx(value), name


def test_twins_tie_alike():
    """Candidates with the same tokens tie in both; which of them comes first is no disagreement."""
    exact = Scores(np.array([1.0, 1.0, 1.0, 0.5, 0.2]), np.array([0.9, 0.9, 0.9, 0.1, 0.1]))
    near = Scores(exact.nll * 1.001, exact.brier)
    found = agreement(exact, near, np.zeros(5), budget=2)
    assert (found.same_top, found.problems) == (1, 1)
    assert found.total_variation == pytest.approx(0, abs=1e-12)


def test_numbers_that_are_lost():
    exact, problem = some_scores(6)
    nll = exact.nll.copy()
    nll[problem == "p0"] = np.nan
    nll[np.flatnonzero(problem != "p0")[0]] = np.inf
    found = agreement(exact, Scores(nll, exact.brier), problem, budget=1)
    n = (problem == "p0").sum() + 1
    assert (found.lost, found.trajectories) == (n, len(problem) - n)
    assert found.largest_total_variation == 1  # nothing is left to weigh
    assert found.same_top < 1
    assert found.nll.largest_error == 0
    assert f"{n} trajectories have lost" in str(found)


def test_nothing_to_compare():
    for exact, problem in ((Scores([], []), []), (Scores([1.0, 0.5], [0.5, 0.2]), [0, 0])):
        found = agreement(exact, exact, problem)
        assert found.problems == 0
        assert math.isnan(found.same_top)
        assert "top" not in str(found)
        assert json.loads(json.dumps(found.as_json(), allow_nan=False))["same_top"] is None


def test_it_reads_well():
    exact, problem = some_scores()
    told = str(agreement(exact, noisy(exact, 0.01), problem))
    for part in (
        "nll: Spearman 0.9",
        "Brier score: ",
        "g_hat: ",
        "within problems 0.9",
        "the same top 3 in ",
        " % of ",
    ):
        assert part in told


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\[N\]"):
        agreement(Scores([1.0, 2.0], [0.5, 0.1]), Scores([1.0, 2.0], [0.5, 0.1]), [0, 0, 0])
    with pytest.raises(ValueError, match="budget"):
        agreement(Scores([1.0, 2.0], [0.5, 0.1]), Scores([1.0, 2.0], [0.5, 0.1]), [0, 0], budget=0)
