"""Races on known numbers: who is stopped, what is forecast, and that hard bounds hold whatever comes."""

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_fast.racing.bernstein import BernsteinForecaster
from lark_fast.racing.forecast import Forecaster
from lark_fast.racing.outcome import missed_winners, proportion_interval
from lark_fast.racing.race import FORECASTERS, Race, replay
from lark_fast.racing.rules import RaceRules
from lark_fast.scoring.head_sampling import sample_rows
from tests.races import make_problem, order


def race(problem, copies=None, samples=None, **rules):
    words, before, nll, brier = problem
    copies = np.ones(len(words), int) if copies is None else copies
    return replay(Race(words, before, copies, RaceRules(**rules), samples=samples), nll, brier)


def samples_of(problem, share):
    return [sample_rows(len(own), share, k.to_bytes(16)) for k, own in enumerate(problem[0])]


def forecaster(words, before):
    return Forecaster(words, before, np.ones(len(words)), RaceRules(budget=1))


def forecast(problem, known):
    words, before, nll, brier = problem
    seen = np.concatenate([np.arange(len(own)) < n for own, n in zip(words, known, strict=True)])
    return Forecaster(words, before, np.ones(len(words)), RaceRules(budget=1))(
        seen, np.concatenate(nll), np.concatenate(brier)
    )


def test_what_is_known_is_not_forecast():
    problem = make_problem(0)
    nll, brier, h, sd, sd_m = forecast(problem, [len(x) for x in problem[0]])
    np.testing.assert_allclose(nll, [x.mean() for x in problem[2]], rtol=1e-12)
    np.testing.assert_allclose(brier, [x.mean() for x in problem[3]], rtol=1e-12)
    assert list(np.argsort(-h)) == list(order(*problem[2:]))
    assert not sd.any()
    assert sd_m == 0


def test_the_table_is_its_definition():
    words, before, nll, _ = make_problem(1, candidates=3, shortest=5, longest=12, words=4)
    known = np.array([4, 3, 5])
    made = forecaster(words, before)
    place = np.concatenate([np.arange(len(x)) for x in words])
    seen = place < np.repeat(known, made.lengths)
    values = np.where(seen, np.concatenate(nll), 0.0)
    expected = []
    for k, own in enumerate(words):
        others = [
            (w, v, x)
            for i in range(3)
            if i != k
            for w, v, x in list(zip(words[i], before[i], nll[i], strict=True))[: known[i]]
        ]
        mean = np.mean([x for *_, x in others])
        for w, v in zip(own, before[k], strict=True):
            of_word = [x for a, _, x in others if a == w]
            of_pair = [x for a, b, x in others if (a, b) == (w, v)]
            base = (sum(of_word) + 4 * mean) / (len(of_word) + 4)
            expected.append((sum(of_pair) + 2 * base) / (len(of_pair) + 2))
    np.testing.assert_allclose(made.table(values, seen), expected, rtol=1e-12)


def test_the_table_beats_the_running_mean():
    table, running = [], []
    for seed in range(20):
        problem = make_problem(seed, candidates=12, shortest=200, longest=400, apart=0.02, noise=0.3)
        known = [len(x) // 5 for x in problem[0]]
        exact = np.array([x.mean() for x in problem[2]])
        table.append(forecast(problem, known).nll - exact)
        running.append(np.array([x[:n].mean() for x, n in zip(problem[2], known, strict=True)]) - exact)
    assert np.std(np.concatenate(table)) < 0.6 * np.std(np.concatenate(running))


def test_errors_are_as_large_as_it_says():
    scaled = []
    for seed in range(40):
        problem = make_problem(seed, candidates=10, shortest=150, longest=300)
        known = [len(x) // 3 for x in problem[0]]
        made, exact = forecast(problem, known), forecast(problem, [len(x) for x in problem[0]])
        m = [f.brier.sum() / f.nll.sum() for f in (made, exact)]
        scaled.append((2 * made.brier - m[1] * made.nll - exact.h) / made.sd)
        assert abs(m[0] - m[1]) < 5 * made.sd_m
    assert 0.7 < np.std(np.concatenate(scaled)) < 1.3


@pytest.mark.parametrize("budget", [1, 3])
def test_it_spares_tokens_and_finds_the_best(budget):
    wrong = spent = total = 0
    for seed in range(60):
        problem = make_problem(seed, candidates=16, shortest=200, longest=500, apart=0.3)
        out = race(problem, budget=budget, risk=0.05)
        best = order(*problem[2:])
        wrong += set(best[:budget]) != set(np.flatnonzero(out.winner))
        spent, total = spent + out.known.sum(), total + sum(map(len, problem[0]))
        full = out.known == [len(x) for x in problem[0]]
        assert full[out.winner].all()
        assert full[np.argsort(-(2 * out.brier - out.brier.sum() / out.nll.sum() * out.nll))[: budget + 1]].all()
    assert wrong <= 6  # 3 expected at most
    assert spent < 0.75 * total


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_with_a_sample_the_head_reads_less_and_the_best_are_found(share):
    wrong = read = reached = total = 0
    for seed in range(60):
        problem = make_problem(seed, candidates=16, shortest=200, longest=500, apart=0.3)
        samples = samples_of(problem, share)
        out = race(problem, samples=samples, budget=3, risk=0.05)
        lengths = np.array([len(x) for x in problem[0]])
        wrong += set(order(*problem[2:])[:3]) != set(np.flatnonzero(out.winner))
        read, reached, total = read + out.known.sum(), reached + out.reached.sum(), total + lengths.sum()
        first = np.argsort(-(2 * out.brier - out.brier.sum() / out.nll.sum() * out.nll))[:4]
        assert set(np.flatnonzero(out.winner)) <= set(first)
        assert (out.known == lengths)[first].all()  # winners, and who sets their threshold
        for k in np.flatnonzero(out.known < out.reached):  # of the others only what the sample has
            assert out.known[k] == np.count_nonzero(samples[k] < out.reached[k])
    assert wrong <= 6  # 3 expected at most
    assert read < 0.9 * reached
    assert reached < 0.95 * total


def test_what_the_head_has_passed_over_is_forecast_as_what_is_to_come():
    scaled = []
    for seed in range(40):
        words, before, nll, brier = make_problem(seed, candidates=10, shortest=150, longest=300)
        made, values = (
            forecaster(words, before),
            (np.concatenate(nll), np.concatenate(brier)),
        )
        seen = np.random.default_rng(seed).random(len(values[0])) < 0.3
        exact, ours = made(np.ones(len(seen), bool), *values), made(seen, *values)
        m = exact.brier.sum() / exact.nll.sum()
        scaled.append((2 * ours.brier - m * ours.nll - exact.h) / ours.sd)
        hidden = [np.where(seen, x, 1e6) for x in values]
        np.testing.assert_array_equal(made(seen, *hidden).h, ours.h)
    assert 0.7 < np.std(np.concatenate(scaled)) < 1.3


@pytest.mark.parametrize("sampled", [[0], [5, 6], [*range(300)]])
def test_samples_of_a_token_or_all_come_to_an_end(sampled):
    problem = make_problem(8, candidates=6, shortest=100, longest=300)
    samples = [[token for token in sampled if token < len(own)] for own in problem[0]]
    out = race(problem, samples=samples, budget=1, risk=0.3)
    assert np.isfinite([*out.nll, *out.brier]).all()
    assert out.known[out.winner] == [len(problem[0][k]) for k in np.flatnonzero(out.winner)]


def test_bernsteins_bounds_are_wider_and_hold():
    rules = RaceRules(budget=2, risk=0.1, bounds="bernstein")
    problem = make_problem(2, candidates=16, shortest=200, longest=500, apart=0.3)
    spent = [race(problem, budget=2, risk=0.1, bounds=bounds).known.sum() for bounds in FORECASTERS]
    assert spent[0] < spent[1]
    # Long texts, at every share; residuals of a distribution with a tail.
    rng, length, candidates = np.random.default_rng(0), 10_000, 20
    words = [np.zeros(length, dtype=np.int64)] * candidates
    made = BernsteinForecaster(words, words, np.ones(candidates), rules)
    beside = Forecaster(words, words, np.ones(candidates), rules)
    for share in (0.1, 0.5, 0.8, 0.9, 0.99):
        n, beyond = int(share * length), 0
        for _ in range(15):
            residuals = rng.gamma(0.5, 2.0, (candidates, length))
            seen = np.tile(np.arange(length) < n, candidates)
            known = np.where(seen, residuals.ravel(), 0.0)
            width = made.quantile * made._spread(known, seen)[1]
            assert (width > beside.quantile * beside._spread(known, seen)[1]).all()
            error = (1 - share) * (residuals[:, n:].mean(1) - residuals[:, :n].mean(1))
            beyond += np.count_nonzero(np.abs(error) > width)
        assert beyond <= 2 * 0.05 * 15 * candidates


def test_a_risk_of_a_half_for_one():
    problem = make_problem(2, candidates=16, shortest=200, longest=500, apart=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spent = [race(problem, budget=1, risk=0.5, bounds=bounds).known.sum() for bounds in FORECASTERS]
    assert spent[0] < spent[1] <= sum(map(len, problem[0]))


def test_what_a_store_is_of():
    assert RaceRules(budget=2).as_json() == {"budget": 2, "risk": 0.05}
    rules = RaceRules(budget=2, risk=0.1, head_share=0.5, bounds="bernstein")
    assert RaceRules(**rules.as_json()) == rules


def test_the_order_of_candidates_is_nothing_to_it():
    problem = make_problem(3, candidates=10, shortest=100, longest=300)
    turned = [column[::-1] for column in problem]
    one, other = race(problem, budget=2, risk=0.1), race(turned, budget=2, risk=0.1)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b[::-1], rtol=1e-12)


def test_copies_count_as_the_candidates_that_they_are():
    problem = make_problem(4, candidates=9)
    best = order(*problem[2:])
    copies = np.ones(9, int)
    copies[best[0]] = 3
    out = race(problem, copies, budget=3, risk=0.05)
    # The means of the problem move with the copies, but three of the best are three winners.
    assert np.flatnonzero(out.winner).tolist() == [best[0]]


@pytest.mark.parametrize(("risk", "sampled"), [(0, False), (0.05, False), (0.05, True)])
def test_numbers_that_are_none_stop_nobody(risk, sampled):
    problem = make_problem(5)
    best = order(*problem[2:])[0]
    problem[2][best][7] = np.nan
    out = race(problem, budget=2, risk=risk, samples=samples_of(problem, 0.5) if sampled else None)
    assert (out.known == [len(x) for x in problem[0]]).all()
    assert set(np.flatnonzero(out.winner)) == set(order(*problem[2:])[:2])  # of the others


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    budget=st.integers(1, 3),
    jump=st.sampled_from([0.0, 2.0, 9.0]),
    share=st.floats(0.5, 0.99),
)
def test_hard_bounds_hold_where_the_loss_jumps_at_the_end(seed, budget, jump, share):
    problem = make_problem(seed, candidates=7, shortest=100, longest=400, apart=0.8)
    rng = np.random.default_rng(seed)
    for nll, brier in zip(*problem[2:], strict=True):
        if rng.random() < 0.5:
            last = slice(int(share * len(nll)), None)
            nll[last], brier[last] = (nll[last] + jump, 2.0) if rng.random() < 0.5 else (1e-4, 0.0)
    out = race(problem, budget=budget, risk=0)
    assert set(order(*problem[2:])[:budget]) == set(np.flatnonzero(out.winner))


def test_hard_bounds_stop_who_has_no_chance():
    # Of 500 tokens, what is left at the end cannot lift a brier of 0 above one of 2.
    words = [np.arange(500) % 7 for _ in range(6)]
    nll = [np.full(500, x) for x in (0.1, 3.0, 3.1, 0.2, 0.1, 0.3)]
    brier = [np.full(500, x) for x in (0.01, 1.9, 1.8, 0.02, 0.01, 0.03)]
    out = race((words, words, nll, brier), budget=1, risk=0)
    assert np.flatnonzero(out.winner).tolist() == order(nll, brier)[:1].tolist()
    assert out.known.sum() < 6 * 500


@pytest.mark.parametrize("risk", [0, 0.05])
def test_candidates_of_a_token_or_a_few(risk):
    problem = [
        [column[:length] for column, length in zip(part, (1, 1, 2, 33, 5, 31), strict=False)]
        for part in make_problem(7)
    ]
    out = race(problem, [1, 2, 1, 1, 3, 1], budget=2, risk=risk)
    assert np.isfinite([*out.nll, *out.brier]).all()
    assert (out.known >= np.minimum(32, [len(x) for x in problem[0]])).all()


def test_missed_winners():
    g_hat = [3.0, 2.0, 1.0, np.nan, 5.0, 5.0, 4.0, 1.0, 2.0]
    winner = [True, True, False, False, True, False, False, False, True]
    problem = [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert missed_winners(g_hat, winner, problem).tolist() == [False, False, False]  # a tie is none
    assert missed_winners(g_hat, [True, False, True, *winner[3:]], problem).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("count", "of", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (29, 29, 0.883, 1.0)]
)
def test_wilsons_interval(count, of, low, high):
    assert proportion_interval(count, of) == pytest.approx((low, high), abs=1e-4)
    assert all(np.isnan(proportion_interval(0, 0)))


def test_the_audit_is_a_tenth_and_always_the_same():
    rules = RaceRules(budget=3)
    drawn = [rules.audits(str(problem)) for problem in range(5000)]
    assert 430 < sum(drawn) < 570
    assert drawn == [RaceRules(budget=1, risk=0.2).audits(str(problem)) for problem in range(5000)]
    assert not any(RaceRules(budget=3, risk=0).audits(str(problem)) for problem in range(50))


def test_rounds_only_grow():
    words, before, nll, brier = make_problem(6, candidates=10)
    entered = Race(words, before, np.ones(10, int), RaceRules(budget=2, risk=0.1))
    reached = []
    while (wanted := entered.asks()) is not None:
        for k, tokens in enumerate(wanted):
            assert tokens.tolist() == list(range(entered.known[k], entered.known[k] + len(tokens)))
            entered.take(k, tokens, nll[k][tokens], brier[k][tokens])
        reached.append(entered.reached.copy())
        assert (entered.known == entered.reached).all()
    assert len(reached) > 3
    assert all((b >= a).all() and (b > a).any() for a, b in itertools.pairwise(reached))
