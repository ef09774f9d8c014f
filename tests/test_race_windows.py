"""Windows for races: who runs, and what is left when a run that was stopped goes on."""

import numpy as np
import pytest

from lark_fast.errors import UserError
from lark_fast.racing.rules import RaceRules
from lark_fast.racing.windows import cut_race_windows, problem_key
from lark_fast.scoring.feed import Trajectory, token_hash
from lark_fast.scoring.layout import Layout

RULES = RaceRules(budget=2)


@pytest.fixture(autouse=True)
def short_ones_race(monkeypatch):
    monkeypatch.setattr("lark_fast.racing.rules.SHORTEST", 0)


def trajectories(*sizes, alike=()):
    """Problems of so many candidates; of those in ``alike`` all candidates have the same tokens."""
    made = []
    for problem, size in enumerate(sizes):
        for candidate in range(size):
            seed = [problem, 0 if problem in alike else candidate]
            ids = np.random.default_rng(seed).integers(0, 99, 20 + 3 * seed[1]).astype(np.int32)
            key = (str(problem), str(candidate))
            place = {"source": "pool", "line": len(made) + 1, "ordinal": len(made), "position": len(made) + 1}
            hashes = {"content_hash": bytes([problem, candidate] * 8), "token_hash": token_hash(ids, ids)}
            made.append(Trajectory(key=key, teacher="", input_ids=ids, labels=ids, truncated=False, **place, **hashes))
    return made


def cut(items, done=(), begun=(), tokens=10_000):
    """(the problem that runs, keys) of each batch."""
    unfinished = {item.key: item.content_hash for item in items if item.key in done}
    layout = Layout(packed=True, border=None, tokens_per_batch=70)
    found = list(cut_race_windows(items, layout, unfinished, tokens, RULES, set(map(problem_key, begun))))
    assert [key for window in found for key in window.keys] == [item.key for item in items]
    return [
        (batch.members[0].race, sorted(item.key for unit in batch.members for item in unit.trajectories))
        for window in found
        for batch in window.batches
    ]


def keys(problem, size):
    return [(str(problem), str(candidate)) for candidate in range(size)]


def test_who_runs():
    batches = cut(trajectories(4, 3, 4, 5, alike=[2]), begun=["3"])
    assert [batch for batch in batches if batch[0] is not None] == [("0", keys(0, 4))]
    in_full = [key for race, own in batches if race is None for key in own]
    assert sorted(in_full) == keys(1, 3) + keys(2, 4) + keys(3, 5)


def test_who_is_long_enough(monkeypatch):
    items = trajectories(4, 4)  # of 19 to 28 scored tokens, 23.5 in the mean
    for shortest, runs in ((0, ["0", "1"]), (23, ["0", "1"]), (24, [])):
        monkeypatch.setattr("lark_fast.racing.rules.SHORTEST", shortest)
        assert [race for race, _ in cut(items) if race is not None] == runs


def test_a_run_that_was_stopped_goes_on_with_the_same_passes():
    items = trajectories(3, 4, 3, 4, 3)
    batches = cut(items)
    in_full = [own for race, own in batches if race is None]
    assert len(in_full) > 2
    done = {*keys(1, 4), *in_full[1], in_full[2][0]}
    left = [(race, [key for key in own if key not in done]) for race, own in batches]
    assert cut(items, done) == [batch for batch in left if batch[1]]


def test_candidates_that_are_done_are_not_scored_again_where_others_of_the_problem_are_not():
    assert cut(trajectories(5), keys(0, 3)) == [(None, [("0", "3"), ("0", "4")])]


def test_a_problem_is_never_cut():
    assert [race for race, _ in cut(trajectories(4, 4, 4), tokens=1)] == ["0", "1", "2"]


def test_a_problem_that_comes_again():
    items = trajectories(4, 4)
    with pytest.raises(UserError, match="pool:1: problem 0 has candidates further up"):
        cut([*items[1:], items[0]])
