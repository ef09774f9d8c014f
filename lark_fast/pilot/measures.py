"""From the runs of a pilot to figures with intervals. Numbers in, numbers out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lark_fast.intervals import (
    CONFIDENCE,
    Interval,
    clustered_interval,
    joint_interval,
    paired_intervals,
    slope_interval,
    t_interval,
)
from lark_fast.pilot.config import BUCKET
from lark_fast.pilot.runs import Run
from lark_fast.ranks import rank_correlation

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a contender came to; means over seeds with their intervals over seeds.

    Attributes:
        runs, diverged: how many ended, and how many blew up; with one of these there are no figures.
        loss: mean nll of the measured held-out trajectories at the end, nats a token.
        area: the same along the run: the area under the held-out curve by its tokens.
        own_fall: -log(after / before) of the loss of what the policy itself selects of the held-out problems; None for
            a bucket.
        teachers: shares of the weight, with the first seed.
    """

    contender: str
    runs: int
    diverged: int
    rows: int
    tokens: float
    epochs: float
    loss: Interval | None
    area: Interval | None
    own_fall: Interval | None
    teachers: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A policy minus the baseline; all gaps hold together with 95 %.

    Attributes:
        loss: of the held-out loss at the end, over seeds and problems together.
        loss_over_seeds, loss_over_problems: had the seeds been others; had other problems been held out.
        area: of the mean loss along the way, over seeds.
        own_fall: over seeds and problems.
    """

    policy: str
    baseline: str
    loss: Interval
    loss_over_seeds: Interval
    loss_over_problems: Interval
    area: Interval
    own_fall: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What the rank of g_hat says of what training on a trajectory is worth.

    Attributes:
        ranks: ``[n]`` the middle of each bucket's ranks, 0 to 1.
        gains: fall of the held-out loss of each, nats a token, over seeds.
        slope: of the gain from the lowest rank to the highest, over seeds and problems together.
        slope_over_seeds, slope_over_problems: each alone.
        correlation: Spearman's, mean over seeds.
    """

    ranks: tuple[float, ...]
    gains: tuple[Interval, ...]
    slope: Interval
    slope_over_seeds: Interval
    slope_over_problems: Interval
    correlation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """All of it; ``start`` is the held-out loss before training."""

    start: float
    outcomes: tuple[Outcome, ...]
    gaps: tuple[Gap, ...]
    worth: Worth | None


def measure(
    runs: Sequence[Run],
    *,
    contenders: Sequence[str],
    baseline: str | None,
    problems: Sequence[str],
    measured: Sequence[bool],
    own_weights: Mapping[tuple[str, int], Sequence[float]],
    take_all: Sequence[str] = (),
) -> Measures:
    """Measure.

    Args:
        runs: the same seeds of every contender.
        contenders: in their order.
        baseline: the policy that others are compared with.
        problems: of each of R held-out trajectories.
        measured: ``[R]`` whether its loss counts.
        own_weights: by policy and seed, ``[R]`` what the policy gives to each.
        take_all: policies that keep every candidate; where the baseline is one, they are not compared with it.
    """
    by_name = {name: [run for run in runs if run.contender == name] for name in contenders}
    whole = {name: own for name, own in by_name.items() if all(run.diverged is None for run in own)}
    held_out = _HeldOut(np.array(problems), np.array(measured, dtype=bool), own_weights)
    same = set(take_all) - {baseline} if baseline in take_all else set()
    starts = [run.held_out[0][1] for run in runs if run.held_out]
    return Measures(
        start=starts[0] if starts else math.nan,
        outcomes=tuple(_outcome(name, own) for name, own in by_name.items()),
        gaps=tuple(_gaps({name: own for name, own in whole.items() if name not in same}, baseline, held_out)),
        worth=_worth(whole, contenders, held_out),
    )


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """R trajectories."""

    problems: NDArray[np.str_]
    measured: NDArray[np.bool_]
    own_weights: Mapping[tuple[str, int], Sequence[float]]

    @property
    def groups(self) -> NDArray[np.str_]:
        """``[M]`` the problems of those whose loss counts."""
        return self.problems[self.measured]

    def after(self, runs: Sequence[Run]) -> Floats:
        """``[M]`` their nll at the end, mean over seeds."""
        return np.mean([run.nll_after for run in runs], axis=0)[self.measured]

    def before(self, runs: Sequence[Run]) -> Floats:
        """``[M]`` the same before training."""
        return np.mean([run.nll_before for run in runs], axis=0)[self.measured]

    def own(self, runs: Sequence[Run]) -> Floats:
        """``[R, 2, S]`` weight x nll before and after."""
        weights = np.array([self.own_weights[run.contender, run.seed] for run in runs])
        nll = np.array([(run.nll_before, run.nll_after) for run in runs])
        return (weights[:, None, :] * nll).transpose(2, 1, 0)


def area_under(curve: Sequence[tuple[int, float]]) -> float:
    """Of [tokens, loss] points by trapezoids, divided by the tokens: the mean loss along the way."""
    tokens, loss = np.array(curve, dtype=np.float64).T
    if tokens[-1] == tokens[0]:
        return float(loss[-1])
    return float(np.trapezoid(loss, tokens) / (tokens[-1] - tokens[0]))


def _outcome(name: str, runs: Sequence[Run]) -> Outcome:
    diverged = sum(run.diverged is not None for run in runs)
    figures: dict[str, Interval | None] = dict.fromkeys(("loss", "area", "own_fall"))
    if not diverged:
        figures["loss"] = t_interval([run.held_out[-1][1] for run in runs])
        figures["area"] = t_interval([area_under(run.held_out) for run in runs])
        if all(run.own is not None for run in runs):
            figures["own_fall"] = t_interval([_fall(run) for run in runs])
    return Outcome(
        contender=name,
        runs=len(runs),
        diverged=diverged,
        rows=runs[0].rows,
        tokens=float(np.mean([run.tokens for run in runs])),
        epochs=float(np.mean([run.epochs for run in runs])),
        teachers=dict(runs[0].teachers),
        **figures,
    )


def _fall(run: Run) -> float:
    assert run.own is not None
    before, after = run.own
    return math.log(before / after)


def _mean_fall(own: Floats) -> float:
    """``[R, 2, S]`` weighted nll -> the fall of the weighted loss, mean over seeds."""
    before, after = own.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.log(before / after).mean())


def _gaps(whole: Mapping[str, Sequence[Run]], baseline: str | None, held_out: _HeldOut) -> Iterator[Gap]:
    """Of the policies whose runs all ended."""
    policies = [name for name in whole if not name.startswith(BUCKET)]
    others = [name for name in policies if name != baseline]
    if baseline not in policies or not others:
        return
    confidence = 1 - (1 - CONFIDENCE) / len(others)  # Bonferroni
    place = policies.index(baseline)

    def over_seeds(value: Callable[[Run], float]) -> dict[str, Interval]:
        values = [[value(run) for run in whole[name]] for name in policies]
        return dict(zip(policies, paired_intervals(values, place, confidence=confidence), strict=True))

    loss, area = over_seeds(lambda run: run.held_out[-1][1]), over_seeds(lambda run: area_under(run.held_out))
    has_own = all(run.own is not None for name in policies for run in whole[name])
    own = over_seeds(_fall) if has_own else {}
    theirs = held_out.own(whole[baseline]) if has_own else None
    for name in others:
        by_row = held_out.after(whole[name]) - held_out.after(whole[baseline])
        over_problems = clustered_interval(
            lambda gaps: float(gaps.mean()), held_out.groups, by_row, confidence=confidence
        )
        own_fall = None
        if has_own:
            own_over_problems = clustered_interval(
                lambda ours, others: _mean_fall(ours) - _mean_fall(others),
                held_out.problems,
                held_out.own(whole[name]),
                theirs,
                confidence=confidence,
            )
            own_fall = joint_interval(own[name], own_over_problems)
        yield Gap(
            policy=name,
            baseline=baseline,
            loss=joint_interval(loss[name], over_problems),
            loss_over_seeds=loss[name],
            loss_over_problems=over_problems,
            area=area[name],
            own_fall=own_fall,
        )


def _worth(whole: Mapping[str, Sequence[Run]], contenders: Sequence[str], held_out: _HeldOut) -> Worth | None:
    """None without buckets, or where a run of one blew up."""
    names = [name for name in contenders if name.startswith(BUCKET)]
    if not names or any(name not in whole for name in names):
        return None
    ranks = (np.arange(len(names)) + 0.5) / len(names)
    gains = np.array([[run.held_out[0][1] - run.held_out[-1][1] for run in whole[name]] for name in names])
    by_row = np.array([held_out.before(whole[name]) - held_out.after(whole[name]) for name in names]).T
    centred = ranks - ranks.mean()

    def slope(own: Floats) -> float:
        return float(own.mean(axis=0) @ centred / (centred @ centred))

    over_seeds = slope_interval(ranks, gains)
    over_problems = clustered_interval(slope, held_out.groups, by_row)
    return Worth(
        ranks=tuple(ranks.tolist()),
        gains=tuple(t_interval(own) for own in gains),
        slope=joint_interval(over_seeds, over_problems),
        slope_over_seeds=over_seeds,
        slope_over_problems=over_problems,
        correlation=float(np.mean([rank_correlation(ranks, gains[:, seed]) for seed in range(gains.shape[1])])),
    )
