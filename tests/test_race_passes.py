"""Passes of races: in pieces or again from the first token, and when the device's memory does not suffice."""

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lark_fast.racing.passes import RacePasses
from lark_fast.racing.rules import RaceRules
from lark_fast.scoring import forward
from lark_fast.scoring.forward import Passes
from lark_fast.student import Student
from tests.tiny import LONGROPE, tiny_decoder, tiny_llama

VOCABULARY, PROMPT, CANDIDATES = 101, 5, 8
RULES = RaceRules(budget=1)
NAMES = [name for name in map(str, range(50)) if not RULES.audits(name)][:2]
AUDITED = next(name for name in map(str, range(50)) if RULES.audits(name))


class Entrant(NamedTuple):
    """A candidate of a problem."""

    race: str | None
    number: int
    copies: int = 1

    @property
    def token_hash(self):
        return self.number.to_bytes(16)


def candidates(problem):
    """Some easy and some hard, of 60 to 130 tokens."""
    rng = np.random.default_rng(problem)
    made = []
    for k in range(CANDIDATES):
        ids = rng.integers(0, VOCABULARY // (1 + k % 3), rng.integers(60, 130))
        labels = np.where(np.arange(len(ids)) < PROMPT, -100, ids)
        made.append((ids, labels))
    return made


def passes_of(model, ahead=0):
    passes = Passes(Student(model), top_k=None, impl="auto", tokens_per_batch=300)
    passes.ahead = ahead  # 1: as on a GPU
    return passes


def raced(passes, problems=range(2), names=NAMES, looked_at=None, rules=RULES):
    """What came of each candidate, by problem and number; None where it could not be scored."""
    entered = ([Entrant(names[problem], k) for k in range(CANDIDATES)] for problem in problems)
    batches = [passes.layout.prepare(of, candidates(p)) for p, of in zip(problems, entered, strict=True)]
    runner, found = RacePasses(passes, rules, looked_at), {}
    with passes.student.packing() if passes.layout.packed else nullcontext():
        for batch, scored in runner.run(batches):
            found |= dict(zip(batch.members, scored or [None] * len(batch.members), strict=True))
    assert len(found) == CANDIDATES * len(problems)
    return {(one.race, one.number): scored for one, scored in found.items()}


def assert_alike(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, one in ours.items():
        values = {name: value for name, value in one.means.items() if value is not None}
        assert values == pytest.approx({name: theirs[key].means[name] for name in values}, rel=2e-6), key


@pytest.fixture(scope="module")
def model():
    return tiny_llama(VOCABULARY).eval()


@pytest.fixture(scope="module")
def expected(model):
    starts = []
    found = raced(passes_of(model), looked_at=lambda before, *_: starts.extend(before))
    assert max(starts) > 0  # pieces went on from those before them
    assert any(one.means["n_raced"] < one.n_tokens for one in found.values())
    return found


SAMPLED = RaceRules(budget=1, risk=0.3, head_share=0.5)


@pytest.fixture(scope="module")
def sampled(model):
    """With a sample of positions, and how many pieces began where, of how many tokens, with how many that are scored"""
    passes = []
    found = raced(passes_of(model), looked_at=lambda *piece: passes.append(piece), rules=SAMPLED)
    return found, passes


def test_with_a_sample_winners_are_read_in_full_without_another_pass(model, sampled):
    found, passes = sampled
    heads_alone = [n_scored for _, lengths, n_scored in passes if not any(lengths)]
    assert sum(heads_alone) > 0
    assert sum(n_scored for *_, n_scored in passes) == sum(one.n_head for one in found.values())
    for problem, name in enumerate(NAMES):
        exact = in_full(passes_of(model), candidates(problem))
        own = {number: one for (race, number), one in found.items() if race == name}
        known = {k: one.means["nll"] for k, one in own.items() if one.n_head == one.n_tokens}
        assert len(known) >= 2
        assert known == pytest.approx({k: exact[k] for k in known}, rel=2e-6)
        assert {k for k, one in own.items() if one.means["winner"]} <= known.keys()
        for k, one in own.items():
            assert one.n_head <= one.means["n_raced"] <= one.n_tokens
            if k in known:
                np.testing.assert_allclose(one.tokens.nll.double().mean(), exact[k], rtol=2e-6)
    assert any(one.n_head < one.means["n_raced"] for one in found.values())


def test_with_a_sample_and_without_keys_and_values_the_same_comes_out(model, sampled, monkeypatch):
    monkeypatch.setattr("lark_fast.racing.passes.PAST_MEMORY_SHARE", 0.0)
    passes = []
    found = raced(passes_of(model), looked_at=lambda *piece: passes.append(piece), rules=SAMPLED)
    assert_alike(found, sampled[0])
    assert all(not any(starts) and all(lengths) for starts, lengths, _ in passes)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("failing", [2, 9, "the head alone", "the head alone, always"])
def test_with_a_sample_a_pass_that_is_done_again_has_left_nothing_behind(model, sampled, failing, ahead, monkeypatch):
    calls, passes = [], passes_of(model, ahead)
    numbers = passes._numbers

    def short(batch, inputs):
        made = numbers(batch, inputs)
        calls.append(batch.hidden is not None)
        alone = calls[-1] and (calls.count(True) == 1 or failing == "the head alone, always")
        if len(calls) == failing or (isinstance(failing, str) and alone):
            raise torch.OutOfMemoryError("out of memory")
        return made

    monkeypatch.setattr(passes, "_numbers", short)
    assert_alike(raced(passes, rules=SAMPLED), sampled[0])


@pytest.mark.parametrize("ahead", [0, 1])
def test_two_problems_take_turns_where_a_pass_is_on_its_way(model, expected, ahead):
    first = []
    found = raced(passes_of(model, ahead), looked_at=lambda before, *_: first.append(max(before) == 0))
    assert_alike(found, expected)
    # By turns, the first rounds of both come before the second one of either.
    assert (first == sorted(first, reverse=True)) == bool(ahead)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("failing", [2, 5])
def test_a_pass_that_is_done_again_has_left_nothing_behind(model, expected, failing, ahead, monkeypatch):
    # The last that a pass needs memory for; by then its layers have made all their keys and values.
    calls, reduce = [], forward.trajectory_reduce

    def short(*arguments):
        calls.append(1)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("out of memory")
        return reduce(*arguments)

    passes = passes_of(model, ahead)
    assert passes.student.continues
    monkeypatch.setattr(forward, "trajectory_reduce", short)
    assert_alike(raced(passes), expected)
    assert len(calls) > failing


def test_without_room_for_keys_and_values_the_race_begins_again(model, expected):
    failed = []

    def no_room(_, __, named):
        past = named.get("past_key_values")
        if past is not None and any(one.length for one in past._pasts):
            failed.append(1)
            raise torch.OutOfMemoryError("out of memory")

    passes = passes_of(model)
    assert passes.student.continues
    handle = model.register_forward_pre_hook(no_room, with_kwargs=True)
    try:
        assert_alike(raced(passes), expected)
    finally:
        handle.remove()
    assert failed


def test_where_a_candidate_does_not_fit_the_others_are_scored_in_full(model):
    lengths = [len(ids) for ids, _ in candidates(0)]

    def no_room(_, args):
        if args[0].numel() > sorted(lengths)[-2]:
            raise torch.OutOfMemoryError("out of memory")

    passes = passes_of(model)
    assert passes.student.unpackable is None
    handle = model.get_input_embeddings().register_forward_pre_hook(no_room)
    try:
        found = raced(passes, [0], names=[AUDITED])  # which passes whole
    finally:
        handle.remove()
    assert [number for (_, number), one in found.items() if one is None] == [int(np.argmax(lengths))]
    for (_, number), one in found.items():
        if one is not None:
            n_tokens = lengths[number] - PROMPT
            assert (one.n_tokens, one.means["n_raced"], one.means["winner"]) == (n_tokens, n_tokens, None)


def in_full(passes, made):
    """nll of each, by a run without races."""
    groups = passes.layout.plan([len(ids) for ids, _ in made])
    batches = [passes.layout.prepare(group, [made[k] for k in group]) for group in groups]
    found = {}
    with passes.student.packing() if passes.layout.packed else nullcontext():
        for batch, scored in passes.run(batches):
            found |= {k: one.means["nll"] for k, one in zip(batch.members, scored, strict=True)}
    return found


LONG = {"original_max_position_embeddings": 64}  # first pieces are shorter, whole candidates longer


@pytest.mark.parametrize(
    ("name", "changes"),
    [("bloom", {}), ("mamba", {}), ("phi3_longrope", {**LONG, "rope_parameters": LONGROPE | LONG})],
)
def test_students_whose_sequences_do_not_pass_in_pieces(name, changes):
    passes = passes_of(tiny_decoder(name, VOCABULARY, **changes).eval())
    assert not passes.student.continues
    exact = in_full(passes, candidates(0))
    found = {number: one for (_, number), one in raced(passes, [0]).items()}
    known = {k: one.means["nll"] for k, one in found.items() if one.means["n_raced"] == one.n_tokens}
    assert len(known) >= 2
    assert known == pytest.approx({k: exact[k] for k in known}, rel=1e-5)
