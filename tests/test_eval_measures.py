"""Verdicts as shares: against every draw of k answers, and by hand."""

import itertools

import numpy as np
import pytest

from lark_fast.evaluation.measures import acc_at_k, measure


def test_acc_at_k_is_the_mean_over_all_draws_of_k():
    correct = np.array(list(itertools.product([False, True], repeat=5)))
    for k in range(1, 6):
        draws = [correct[:, list(drawn)].any(axis=1) for drawn in itertools.combinations(range(5), k)]
        np.testing.assert_allclose(acc_at_k(correct, k), np.mean(draws, axis=0), atol=1e-15)
    np.testing.assert_array_equal(acc_at_k(correct, 5), correct.any(axis=1))
    for k in (0, 6):
        with pytest.raises(ValueError, match="1 to 5"):
            acc_at_k(correct, k)


def test_many_answers_neither_overflow_nor_cancel():
    correct = np.arange(10_000)[None] < 3
    assert acc_at_k(correct, 5_000)[0] == pytest.approx(1 - 5000 * 4999 * 4998 / (10_000 * 9_999 * 9_998), rel=1e-12)


def test_measures_by_hand():
    correct = [[True, False], [False, False], [True, True], [False, True]]
    found = measure(
        correct,
        [True, False, True, False],
        unanswered=[[False, True], [True, True], [False, False], [False, False]],
        cut=[[False, False], [True, False], [False, False], [False, False]],
        tokens=[[10, 20], [30, 40], [50, 60], [70, 80]],
        groups=["10", "9", "10", ""],
    )
    assert (found.problems, found.n) == (4, 2)
    assert (found.acc_1.mean, found.acc_n.mean, found.majority.mean) == (0.5, 0.75, 0.5)
    assert found.acc_k == (0.5, 0.75)
    assert (found.unanswered, found.cut, found.tokens) == (0.375, 0.125, 45)
    assert list(found.groups) == ["9", "10"], "levels in their order"
    assert (found.groups["10"].problems, found.groups["10"].acc_1.mean) == (2, 0.75)
    assert found.acc_1.low < 0.5 < found.acc_1.high
    assert found.as_json()["groups"]["9"]["acc_n"]["mean"] == 0
