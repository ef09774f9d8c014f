"""How sequences are brought together: packs nearly full, batches nearly without padding, none lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_fast.packing import length_batches, packs

LENGTHS = st.lists(st.integers(0, 60), max_size=80)
BUDGETS = st.integers(1, 100)
BORDERS = st.none() | st.integers(0, 60)


def tokens(lengths, groups):
    return [sum(lengths[i] for i in group) for group in groups]


@pytest.mark.parametrize("make", [packs, length_batches])
@given(lengths=LENGTHS, budget=BUDGETS, border=BORDERS)
def test_each_sequence_once_inside_the_budget_and_on_its_side_of_the_border(make, lengths, budget, border):
    groups = list(make(lengths, budget, border))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(groups)
    for group in groups:
        longest = max(lengths[i] for i in group)
        size = sum(lengths[i] for i in group) if make is packs else len(group) * longest
        assert size <= budget or len(group) == 1
        if border is not None:
            assert len({lengths[i] > border for i in group}) == 1


@given(lengths=LENGTHS, budget=BUDGETS, border=BORDERS)
def test_longest_first(lengths, budget, border):
    # The largest pass comes first: memory that does not suffice shows at once, and no straggler comes last.
    groups = list(packs(lengths, budget, border))
    leaders = [lengths[group[0]] for group in groups]
    assert leaders == sorted(leaders, reverse=True)
    for group in groups:
        assert [lengths[i] for i in group] == sorted((lengths[i] for i in group), reverse=True)


@given(lengths=LENGTHS, budget=BUDGETS, border=BORDERS)
def test_at_most_one_pack_a_side_is_less_than_half_full(lengths, budget, border):
    # Two half empty ones would be one.
    groups = list(packs(lengths, budget, border))
    for side in {border is not None and lengths[group[0]] > border for group in groups}:
        own = [g for g in groups if (border is not None and lengths[g[0]] > border) is side]
        assert sum(2 * used <= budget for used in tokens(lengths, own)) <= 1


@pytest.mark.parametrize("make", [packs, length_batches])
@given(lengths=LENGTHS, budget=BUDGETS)
def test_the_same_each_time_and_ties_by_index(make, lengths, budget):
    groups = list(make(tuple(lengths), budget))
    assert groups == list(make(np.array(lengths, dtype=int), budget))
    firsts = {}
    for group in groups:
        for i in group:
            # Among equals the first index goes first, wherever there is room.
            assert firsts.get(lengths[i], -1) < i or make is packs
            firsts[lengths[i]] = i


@pytest.mark.parametrize(
    ("median", "spread", "budget", "fill"),
    # Reasoning traces in a GPU's packs, in packs that hold a few, and short answers on a CPU. The fill counts packs of
    # several; what is longer than the budget cannot be helped, and the last pack is what is left.
    [(4000, 0.8, 32768, 0.995), (4000, 0.8, 8192, 0.93), (300, 0.6, 2048, 0.995)],
)
def test_packs_are_nearly_full(median, spread, budget, fill):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        lengths = np.exp(rng.normal(np.log(median), spread, 1000)).astype(int) + 2
        groups = list(packs(lengths, budget))
        inside = sorted(used for used in tokens(lengths, groups) if used <= budget)[1:]
        assert sum(inside) / (len(inside) * budget) >= fill
        # No way of packing could do with fewer than this.
        assert len(groups) <= np.ceil(sum(inside) / budget / fill) + sum(lengths > budget) + 1


def test_what_fits_is_put_where_least_room_is_left():
    #                    0  1  2  3  4  5
    assert list(packs([7, 6, 3, 4, 1, 9], 10)) == [[5, 4], [0, 2], [1, 3]]
    assert list(packs([7, 6, 3, 4, 1, 12], 10)) == [[5], [0, 2], [1, 3], [4]]


def test_nothing_to_pack():
    assert list(packs([], 10)) == list(packs([], 10, 5)) == list(length_batches([], 10)) == []


def test_rows_of_nothing_count_as_one_column():
    # Or a batch of any number of them would seem to cost nothing.
    assert [len(batch) for batch in length_batches([0] * 7, 3)] == [3, 3, 1]
