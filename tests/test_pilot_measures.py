"""What a pilot measures and says, on runs whose answers are known."""

import json
import math
import re

import numpy as np
import pytest

from lark_fast.pilot.measures import area_under, measure
from lark_fast.pilot.runs import Run
from lark_fast.pilot.verdict import verdict

PROBLEMS = [str(number // 3) for number in range(60)]  # 20 of 3 trajectories
SIZES = {"trained_problems": 100, "held_out_problems": 20, "seeds": 3, "steps": 50, "budget": 3, "take_all": ("full",)}


def run(contender, seed, end, *, own=1.0, noise=0.002, diverged=None):
    """Down from 3 to ``end``, which every problem shares but for noise."""
    rng = np.random.default_rng((seed, len(contender)))
    after = end + np.repeat(rng.normal(0, noise, 20), 3)
    mean = float(after.mean())
    return Run(
        contender=contender,
        seed=seed,
        rows=50,
        steps=2,
        tokens=100,
        epochs=0.5,
        tokens_per_second=1.0,
        training=((0, 3.0), (50, 2.5)),
        held_out=((0, 3.0), (50, (3 + mean) / 2), (100, mean)),
        nll_before=(3.0,) * 60 if diverged is None else (),
        nll_after=tuple(after.tolist()) if diverged is None else (),
        own=None if contender.startswith("bucket") else (3.0, 3.0 * math.exp(-own)),
        teachers={"a": 1.0},
        diverged=diverged,
    )


def measured_of(ends, *, own=None, seeds=3, **settings):
    jitter = np.random.default_rng(0).normal(0, 0.003, (len(ends), seeds))
    runs = [
        run(name, seed, end + jitter[place, seed], own=(own or {}).get(name, 1.0), **settings)
        for seed in range(seeds)
        for place, (name, end) in enumerate(ends.items())
    ]
    return measured_runs(runs, tuple(ends))


def measured_runs(runs, contenders, measured=(True,) * 60):
    weights = {(one.contender, one.seed): [1 / 3] * 60 for one in runs}
    return measure(
        runs, contenders=contenders, baseline="random", problems=PROBLEMS, measured=measured, own_weights=weights
    )


def said_of(measured, **changes):
    return " ".join(verdict(measured, **{**SIZES, **changes}))


def test_a_policy_that_is_better_and_one_that_is_worse():
    measured = measured_of({"chi2": 2.0, "random": 2.2, "nll": 2.5, "full": 2.2})
    signs = {gap.policy: gap.loss.sign for gap in measured.gaps}
    assert signs == {"chi2": -1, "nll": 1, "full": 0}
    said = said_of(measured)
    assert re.search(r"chi2 ends below random by 0\.(19|20)\d\d nats a token", said)
    assert re.search(r"nll ends above random by 0\.(29|30)\d\d nats a token", said)
    assert "full cannot be told from it" in said
    by_name = {gap.policy: gap for gap in measured.gaps}
    assert by_name["chi2"].loss_over_problems.mean == pytest.approx(-0.2, abs=0.02)
    # The area is of the whole way: half of the gap at the end.
    assert by_name["chi2"].area.mean == pytest.approx(-0.1, abs=0.01)


def test_nothing_separates_the_policies():
    said = said_of(measured_of({"chi2": 2.2, "random": 2.2, "nll": 2.2}, noise=0.05))
    assert "Nothing separates the policies here" in said
    assert "chi2 and nll cannot be told from random's" in said


def test_seeds_alone_or_problems_alone_do_not_separate():
    # All of the gap is in one problem: it could as well not have been held out.
    runs = []
    for seed in range(3):
        for name in ("random", "chi2"):
            after = [2.0] * 60
            if name == "chi2":
                after[0] -= 3.0
            mean = float(np.mean(after))
            own = run(name, seed, 2.0)
            settings = {field: getattr(own, field) for field in own.__dataclass_fields__}
            runs.append(
                Run(**settings | {"nll_after": tuple(after), "held_out": ((0, 3.0), (100, mean + 0.0001 * seed))})
            )
    measured = measured_runs(runs, ("random", "chi2"))
    (gap,) = measured.gaps
    assert gap.loss_over_seeds.sign == -1
    assert gap.loss_over_problems.sign == 0
    assert gap.loss.sign == 0


def test_the_loss_of_what_is_selected():
    measured = measured_of({"chi2": 2.2, "random": 2.2, "nll": 2.2}, own={"chi2": 2.0, "random": 1.0, "nll": 0.5})
    outcomes = {one.contender: one for one in measured.outcomes}
    assert outcomes["chi2"].own_fall.mean == pytest.approx(2.0)
    said = said_of(measured)
    assert "chi2's falls faster than random's; nll's falls more slowly than random's" in said
    alike = said_of(measured_of({"chi2": 2.2, "random": 2.2}))
    assert "falls no faster and no more slowly than random's, as far as can be told" in alike


@pytest.mark.parametrize(("ends", "word"), [((2.5, 2.4, 2.3, 2.2), "more"), ((2.2, 2.3, 2.4, 2.5), "less")])
def test_what_a_rank_is_worth(ends, word):
    measured = measured_of({f"bucket-{place + 1}-of-4": end for place, end in enumerate(ends)})
    worth = measured.worth
    assert worth.ranks == (0.125, 0.375, 0.625, 0.875)
    slope = (ends[0] - ends[-1]) / 0.75
    assert worth.slope_over_seeds.mean == pytest.approx(slope, abs=0.02)
    assert worth.slope_over_problems.mean == pytest.approx(slope, abs=0.02)
    assert abs(worth.correlation) == 1
    assert f"are worth {word}" in said_of(measured)


def test_a_rank_that_says_nothing():
    measured = measured_of({f"bucket-{place + 1}-of-3": end for place, end in enumerate((2.2, 2.5, 2.2))})
    assert measured.worth.slope.sign == 0
    assert "does not tell what training on a trajectory is worth" in said_of(measured)


def test_runs_that_blow_up_have_no_figures():
    ends = {"chi2": 2.0, "random": 2.2, "nll": 2.2}
    runs = [
        run(name, seed, end, diverged="step 3: the loss is nan" if (name, seed) == ("chi2", 1) else None)
        for seed in range(3)
        for name, end in ends.items()
    ]
    measured = measured_runs(runs, tuple(ends))
    assert measured.outcomes[0].diverged == 1
    assert measured.outcomes[0].loss is None
    assert [gap.policy for gap in measured.gaps] == ["nll"]
    said = said_of(measured)
    assert "explodes in runs of chi2 (1 of 3)" in said
    assert "Lower --lr" in said


def test_runs_too_short_to_train():
    measured = measured_of({"chi2": 2.2, "random": 2.2}, noise=0.05)
    assert "The shortest run has 1 step(s), which hardly trains" in said_of(measured, steps=1)
    assert "step(s)" not in said_of(measured)
    assert "The largest difference is chi2's, " in said_of(measured)


def test_only_measured_trajectories_count():
    runs = [run(name, seed, end) for seed in range(2) for name, end in (("chi2", 2.0), ("random", 2.2))]
    counted = [place < 30 for place in range(60)]
    measured = measured_runs(runs, ("chi2", "random"), counted)
    expected = np.mean([np.array(one.nll_after)[:30].mean() for one in runs if one.contender == "chi2"]) - np.mean(
        [np.array(one.nll_after)[:30].mean() for one in runs if one.contender == "random"]
    )
    assert measured.gaps[0].loss_over_problems.mean == pytest.approx(expected)


def test_area_under():
    assert area_under([(0, 3.0), (50, 2.0), (100, 2.0)]) == pytest.approx(2.25)
    assert area_under([(0, 3.0)]) == 3.0


def test_too_small_and_one_seed():
    measured = measured_of({"chi2": 2.0, "random": 2.2})
    assert "Too small to say anything: 3 problem(s) held out" in said_of(measured, held_out_problems=3)
    assert "5 problem(s) to train on" in said_of(measured, trained_problems=5)
    assert "One seed tells nothing" in said_of(measured_of({"chi2": 2.0, "random": 2.2}, seeds=1), seeds=1)


def test_a_run_is_what_its_line_says():
    one = run("chi2", 0, 2.0)
    assert Run.from_json(json.loads(json.dumps(one.as_json()))) == one
    with pytest.raises(TypeError):
        Run.from_json({**one.as_json(), "other": 1})
