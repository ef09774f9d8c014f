"""What a diagnosis measures and says, on problems whose answers are known."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from lark_fast.diagnosis.exact import rate_gradient, relative_rate
from lark_fast.diagnosis.measures import measure
from lark_fast.diagnosis.verdict import find, verdict
from lark_fast.scoring.learnability import g_hat

K, B = 6, 3


def line(number, *, kappa=lambda tokens, rng: 7.0, overlap=0.0, after=None, seed=0, finite=True):
    """A problem of K candidates: |grad nll_k|^2 = kappa * brier_k, and cosines of ``overlap`` between them."""
    rng = np.random.default_rng((seed, number))
    tokens = rng.integers(50, 500, K)
    nll, brier = rng.uniform(0.5, 3, K), rng.uniform(0.1, 0.9, K)
    norms = np.array([kappa(count, rng) for count in tokens]) * brier
    gram = np.sqrt(np.outer(norms, norms)) * (overlap + (1 - overlap) * np.eye(K))
    weights = {
        "full": np.full(K, 1 / K),
        "chi2": rng.dirichlet(np.ones(K)),
        "chi2 by lot": rng.dirichlet(np.ones(K)),
    }

    def steps(rate, lr):
        return {"lr": lr, "steps": 1, "before": 1.0, "after": math.exp(-rate * lr) if after is None else after}

    alone = norms / nll
    taken = {
        name: {
            "alone": [steps(rate, lr) for rate in alone],
            **{policy: steps(relative_rate(gram, nll, q), lr) for policy, q in weights.items()},
        }
        for name, lr in (("sgd", 1e-3), ("adamw", 1e-5))
    }
    return {
        "problem_id": str(number),
        "candidates": [
            {"n_tokens": int(count), "source": "pool.jsonl", "line": place} for place, count in enumerate(tokens)
        ],
        "not_finite": [] if finite else ["pool.jsonl:5"],
        "nll": nll.tolist(),
        "brier": brier.tolist(),
        "gram": gram.tolist(),
        "stranger": {"squared_norm": None, "products": None},
        "weights": {name: q.tolist() for name, q in weights.items()},
        "steps": taken,
    }


def lines(count=30, **settings):
    return [line(number, **settings) for number in range(count)]


def test_where_the_assumptions_hold():
    measured = measure(lines(), budget=B)
    assert measured.kappa.median.mean == pytest.approx(7)
    assert measured.kappa.spread.mean == pytest.approx(1)
    assert measured.overlap.share.mean == pytest.approx(0, abs=1e-12)
    ours = find(measured, "g_hat", "dR/dq")
    assert ours.spearman.mean == pytest.approx(1)
    assert ours.top.mean == 1
    assert ours.by_chance == B / K
    assert measured.descent.ratio.mean == pytest.approx(1)
    assert not measured.adamw.too_large
    said = verdict(measured, lr=1e-5)
    assert "may pass for a constant" in said[0]
    assert "are nearly orthogonal" in said[1]
    assert "g_hat orders candidates much as the exact dR/dq does" in said[2]
    assert "a fair guide" in said[-1]


def test_kappa_that_falls_with_length():
    measured = measure(lines(kappa=lambda tokens, rng: 900 / tokens), budget=B)
    assert measured.kappa.slope.mean == pytest.approx(-1)
    assert measured.kappa.explained.mean == pytest.approx(1)
    assert measured.kappa.spread_at_length.mean == pytest.approx(1)
    # Brier x tokens^slope is then |grad nll|^2 but for a factor.
    assert find(measured, "g_hat with Brier x tokens^slope", "dR/dq").spearman.mean == pytest.approx(1)
    assert find(measured, "g_hat", "dR/dq").spearman.mean < 0.9
    said = " ".join(verdict(measured, lr=1e-5))
    assert "is not constant" in said
    assert "falls with length, as tokens^-1.00" in said


def test_gradients_that_overlap():
    measured = measure(lines(overlap=0.5), budget=B)
    assert measured.overlap.within_mean.mean == pytest.approx(0.5)
    assert measured.overlap.share.low > 0.5
    assert "are not orthogonal" in verdict(measured, lr=1e-5)[1]
    assert find(measured, "g_hat with exact |grad nll|^2", "dR/dq").spearman.mean < 1


def test_the_agreement_is_scipys_mean_over_problems():
    found = lines(12, kappa=lambda tokens, rng: rng.uniform(1, 20), overlap=0.3)
    uniform = np.full(K, 1 / K)
    expected = np.mean(
        [
            spearmanr(
                g_hat(one["nll"], one["brier"], np.zeros(K)), rate_gradient(one["gram"], one["nll"], uniform)
            ).statistic
            for one in found
        ]
    )
    assert find(measure(found, budget=B), "g_hat", "dR/dq").spearman.mean == pytest.approx(expected)


def test_scores_that_say_nothing_and_scores_that_mislead():
    unrelated = lines()
    for number, one in enumerate(unrelated):
        one["nll"] = [1.0] * K
        one["gram"] = np.diag(np.random.default_rng(number).uniform(1, 9, K)).tolist()
    said = verdict(measure(unrelated, budget=B), lr=1e-5)
    assert "In this sample g_hat tells nothing of the order of candidates by the exact dR/dq" in said[2]
    assert "does not show that g_hat says anything" in said[-1]
    contrary = lines()
    for one in contrary:
        norms = np.array(one["nll"]) ** 2 * 0.01 / np.array(one["brier"]) ** 2
        one["gram"] = np.diag(norms).tolist()
    assert "the wrong way round" in verdict(measure(contrary, budget=B), lr=1e-5)[-1]


def test_steps_that_explode():
    for after in (2.0, None):
        found = lines(after=2.0)
        for one in found:
            for run in one["steps"]["adamw"]["alone"]:
                run["after"] = after
        measured = measure(found, budget=B)
        assert measured.adamw.too_large
        said = " ".join(verdict(measured, lr=0.5))
        assert "AdamW at lr 0.5 is too large for this student" in said
        assert "real steps" not in said


def test_steps_that_are_lost_in_rounding():
    found = lines(after=1.0)
    measured = measure(found, budget=B)
    assert measured.adamw.too_small
    assert not measured.adamw.too_large
    said = " ".join(verdict(measured, lr=1e-9))
    assert "Steps of AdamW at lr 1e-09 are lost in rounding in" in said
    assert "Raise --lr" in said


def test_problems_where_a_loss_rose_are_left_out_of_the_pace_and_counted():
    found = lines(20)
    for one in found[:2]:
        one["steps"]["adamw"]["chi2"]["after"] = 1.1
    measured = measure(found, budget=B)
    assert [(pace.beside, pace.problems, pace.left_out) for pace in measured.paces] == [
        *(("full", 20, 2), ("chi2 by lot", 20, 2))
    ]
    assert "without 2 problems where a loss did not fall" in " ".join(verdict(measured, lr=1e-5))


def test_a_trajectory_far_out_is_named():
    found = lines(9)
    assert measure(found, budget=B).outliers == ()
    found[3]["gram"][2][2] *= 20
    measured = measure(found, budget=B)
    assert measured.outliers == ("pool.jsonl:2",)
    assert "1 trajectories have a kappa more than 10 times the median" in " ".join(verdict(measured, lr=1e-5))


def test_a_problem_of_which_nothing_is_finite():
    broken = {"problem_id": "b", "not_finite": ["pool.jsonl:8", "pool.jsonl:9"], "nll": []}
    measured = measure([*lines(9), broken], budget=B)
    assert measured.problems == 9
    assert measured.not_finite == ("pool.jsonl:8", "pool.jsonl:9")


def test_few_problems_and_trajectories_left_out():
    said = verdict(measure([*lines(7), line(8, finite=False)], budget=B), lr=1e-5)
    assert "loss or gradient of 1 trajectories is not finite (pool.jsonl:5 first)" in said[0]
    assert "kappa" in said[1]
    few = verdict(measure(lines(7), budget=B), lr=1e-5)
    assert len(few) == 1
    assert few[0].startswith("Too small to say anything: 7 problem(s)")


def test_candidates_that_cannot_be_told_apart():
    found = lines(9)
    for one in found:
        one["nll"], one["brier"] = [1.0] * K, [0.5] * K
        one["gram"] = (np.eye(K) * 3.5).tolist()
    measured = measure(found, budget=B)
    assert find(measured, "g_hat", "dR/dq").problems == 0
    assert "there is nothing to choose by" in verdict(measured, lr=1e-5)[-1]
