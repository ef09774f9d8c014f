"""The formulas of training on their own."""

import math

import numpy as np
import pytest

from lark_fast.training.objective import learning_rate, mean_weight, token_weights

WEIGHTS = np.array([0.5, 2.0, 0.01, 1.0])
SCORED = np.array([3, 7, 20, 1])


@pytest.mark.parametrize("loss_norm", ["trajectory", "token"])
def test_a_whole_epoch_in_one_step_is_the_objective(loss_norm):
    # With n = N, n * mean(w) is sum(w): the step is the objective itself, sum w nll / sum w.
    nll = [np.linspace(0.1, 2.0, t) for t in SCORED]
    mean = mean_weight(WEIGHTS, SCORED, loss_norm)
    factors = token_weights(WEIGHTS, SCORED, batch_size=4, mean=mean, loss_norm=loss_norm)
    step = sum(f * tokens.sum() for f, tokens in zip(factors, nll, strict=True))
    if loss_norm == "trajectory":
        expected = sum(w * tokens.mean() for w, tokens in zip(WEIGHTS, nll, strict=True)) / WEIGHTS.sum()
    else:
        expected = sum(w * tokens.sum() for w, tokens in zip(WEIGHTS, nll, strict=True)) / (WEIGHTS @ SCORED)
    assert step == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("loss_norm", ["trajectory", "token"])
def test_a_micro_batch_gets_the_factors_it_has_in_the_whole_batch(loss_norm):
    common = {"batch_size": 4, "mean": mean_weight(WEIGHTS, SCORED, loss_norm), "loss_norm": loss_norm}
    whole = token_weights(WEIGHTS, SCORED, **common)
    alone = [token_weights(WEIGHTS[i : i + 1], SCORED[i : i + 1], **common)[0] for i in range(4)]
    np.testing.assert_array_equal(whole, alone)
    np.testing.assert_allclose(whole / token_weights(10 * WEIGHTS, SCORED, **common), 0.1)


# 1 step, warm-up alone, no warm-up, and a usual run.
@pytest.mark.parametrize(("total", "ratio"), [(1, 0.0), (1, 0.05), (7, 1.0), (7, 0.0), (100, 0.05)])
def test_learning_rate(total, ratio):
    rates = [learning_rate(step, total, 1e-3, ratio) for step in range(total)]
    warmup = math.ceil(ratio * total)
    assert all(0 < rate <= 1e-3 for rate in rates)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[:warmup] == pytest.approx([1e-3 * (i + 1) / warmup for i in range(warmup)])
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


def test_learning_rate_is_a_cosine():
    assert learning_rate(5, 10, 1.0, 0.0) == pytest.approx(0.5)
    assert learning_rate(6, 10, 1.0, 0.2) == pytest.approx(0.5)
