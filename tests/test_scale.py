"""The simulation behind docs/scale.md agrees with what can be computed by hand, and the page quotes what it prints."""

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.documents import DOCS, SCALE, render
from benchmarks.scale import (
    HOUR,
    Passes,
    expected_without_journal,
    node_rows,
    run_in_step,
    run_queue,
    run_shares,
)
from benchmarks.scale_plan import STUDENTS, two_digits
from lark_fast.flop import ForwardCost

ALL = (run_queue, run_shares, run_in_step)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("run", ALL)
def test_equal_workers_and_equal_work_are_ideal(run):
    outcome = run(np.full(80, 3.0), np.full(8, 1.5), rng())
    assert outcome.makespan == pytest.approx(80 * 3 / (8 * 1.5))
    assert outcome.share("worked") == pytest.approx(1)
    assert outcome.idle == pytest.approx(0, abs=1e-9)


def test_one_worker_of_half_speed():
    work, speeds = np.full(800, 1.0), np.array([0.5] + [1.0] * 7)
    plain = 800 / 8
    assert run_shares(work, speeds, rng()).makespan == pytest.approx(2 * plain)
    assert run_in_step(work, speeds, rng()).makespan == pytest.approx(2 * plain)
    assert run_shares(work, speeds, rng()).share("idle") == pytest.approx(7 / 16)
    ideal = 800 / speeds.sum()
    assert ideal <= run_queue(work, speeds, rng()).makespan <= ideal + 2


def test_in_step_with_exponential_times():
    """The largest of W exponential times has the mean 1 + 1/2 + ... + 1/W."""
    workers, steps = 8, 20_000
    outcome = run_in_step(rng().exponential(1.0, workers * steps), np.ones(workers), rng())
    assert outcome.makespan / steps == pytest.approx(sum(1 / k for k in range(1, workers + 1)), rel=0.02)


def test_a_startup_for_each_unit():
    outcome = run_queue([10.0] * 6, np.ones(3), rng(), startup=2.0)
    assert outcome.makespan == 24
    assert (outcome.worked, outcome.down, outcome.redone, outcome.idle) == (60, 12, 0, 0)


@pytest.mark.parametrize("loses", [0.0, math.inf])
def test_failures_of_one_worker(loses):
    work, mtbf, restart = 30.0, 20.0, 5.0
    one = np.ones(1)
    runs = [run_queue([work], one, rng(seed), mtbf=mtbf, restart=restart, loses=loses) for seed in range(6000)]
    mean = np.mean([run.makespan for run in runs])
    if loses:
        assert mean == pytest.approx(expected_without_journal(work, mtbf, restart), rel=0.05)
    else:
        assert mean == pytest.approx(work * (1 + restart / mtbf), rel=0.02)
        assert all(run.redone == 0 for run in runs)
    assert all(run.worked == pytest.approx(work) for run in runs)
    assert all(run.worked + run.redone + run.down == pytest.approx(run.makespan) for run in runs)


def test_what_a_lost_worker_had_is_done_by_others():
    """Eight units for eight workers, all of which fail: nothing waits for a restart that takes for ever."""
    work, speeds = np.full(64, 1.0), np.ones(8)
    runs = [run_queue(work, speeds, rng(seed), mtbf=100.0, restart=1e9) for seed in range(50)]
    lost = [run for run in runs if run.redone]
    assert len(lost) > 20
    assert all(run.makespan < 64 for run in lost)
    assert all(run.worked == pytest.approx(64) for run in runs)
    assert all(run.idle > -1e-9 for run in runs)
    parts = [run_shares(work, speeds, rng(seed), mtbf=100.0, restart=1e9).makespan for seed in range(50)]
    assert max(parts) > 1e9, "a share of its own waits"


def test_failures_in_step():
    """Each stops all: W workers, failures every M / W, and half a step is done again."""
    work, speeds = np.full(8 * 40_000, 1.0), np.ones(8)
    outcome = run_in_step(work, speeds, rng(), mtbf=800.0, restart=20.0)
    assert outcome.makespan / 40_000 == pytest.approx((100 + 20) * math.expm1(1 / 100), rel=0.02)


def test_stragglers_cost_what_they_are_drawn_to():
    """Held up is one pass in 500, by 2 passes times 1 + Pareto with index 1.5, whose mean is 3."""
    passes = Passes(spread=0.0, speed_spread=0.0, held_up=0.1)
    work, speeds, ideal = passes.draw(400_000, 8, False, rng())
    assert work.sum() / speeds.sum() / ideal == pytest.approx(1 + 0.1 * 2 * 3, rel=0.05)
    assert int(HOUR / passes.seconds) * passes.seconds == pytest.approx(HOUR, rel=0.001)


def test_seeds_give_the_same_and_others_not():
    passes = Passes(seconds=60.0)
    assert node_rows(passes, 2) == node_rows(passes, 2)
    assert node_rows(passes, 2) != node_rows(passes, 3)


def test_shapes_cost_what_the_models_do():
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = replace(STUDENTS["0.5B"], layers=2)
    config = Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocabulary,
        use_sliding_window=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for lengths, n_scored in (([3000], 2940), ([7, 100], 20)):
        assert shape.cost().flop(lengths, n_scored) == ForwardCost.of(model).flop(lengths, n_scored)
    assert 13e9 < STUDENTS["7B"].cost().body < 13.1e9


def test_two_digits():
    assert [two_digits(x) for x in (0.0123, 0.99, 9.94, 12.3, 1234.0)] == ["0.012", "0.99", "9.9", "12", "1,200"]


def test_the_page_quotes_what_the_program_prints():
    assert (DOCS / SCALE).read_text(encoding="utf-8") == render(SCALE, []), "run `make docs`"
