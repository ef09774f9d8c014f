"""From the runs of a pilot to figures with intervals. Numbers in, numbers out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lark_fast.intervals import CONFIDENCE, Interval, clustered_interval, paired_intervals, slope_interval, t_interval
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
        loss_over_seeds, loss_over_problems: of the held-out loss at the end: had the seeds been others, and had other
            problems been held out.
        area, own_fall: over seeds.
    """

    policy: str
    baseline: str
    loss_over_seeds: Interval
    loss_over_problems: Interval
    area: Interval
    own_fall: Interval | None

    @property
    def sign(self) -> int:
        """-1 where the loss is lower by both intervals, 1 where higher, else 0."""
        signs = {self.loss_over_seeds.sign, self.loss_over_problems.sign}
        return signs.pop() if len(signs) == 1 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What the rank of g_hat says of what training on a trajectory is worth.

    Attributes:
        ranks: ``[n]`` the middle of each bucket's ranks, 0 to 1.
        gains: fall of the held-out loss of each, nats a token, over seeds.
        slope_over_seeds, slope_over_problems: of the gain from the lowest rank to the highest.
        correlation: Spearman's, mean over seeds.
    """

    ranks: tuple[float, ...]
    gains: tuple[Interval, ...]
    slope_over_seeds: Interval
    slope_over_problems: Interval
    correlation: float

    @property
    def sign(self) -> int:
        """1 where a higher g_hat is worth more by both intervals, -1 where less, else 0."""
        signs = {self.slope_over_seeds.sign, self.slope_over_problems.sign}
        return signs.pop() if len(signs) == 1 else 0


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
) -> Measures:
    """Measure.

    Args:
        runs: the same seeds of every contender.
        contenders: in their order.
        baseline: the policy that others are compared with.
        problems: of each held-out trajectory.
        measured: whether its loss counts.
    """
    by_name = {name: [run for run in runs if run.contender == name] for name in contenders}
    whole = {name: own for name, own in by_name.items() if all(run.diverged is None for run in own)}
    counts = np.array(measured, dtype=bool)
    groups = np.array(problems)[counts]
    starts = [run.held_out[0][1] for run in runs if run.held_out]
    return Measures(
        start=starts[0] if starts else math.nan,
        outcomes=tuple(_outcome(name, own) for name, own in by_name.items()),
        gaps=tuple(_gaps(whole, baseline, groups, counts)),
        worth=_worth(whole, contenders, groups, counts),
    )


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
    return math.log(before / after) if before > 0 and after > 0 else math.nan


def _gaps(
    whole: dict[str, list[Run]], baseline: str | None, groups: NDArray[np.str_], counts: NDArray[np.bool_]
) -> list[Gap]:
    """Of the policies whose runs all ended."""
    policies = [name for name in whole if not name.startswith(BUCKET)]
    others = [name for name in policies if name != baseline]
    if baseline not in policies or not others:
        return []
    confidence = 1 - (1 - CONFIDENCE) / len(others)  # Bonferroni
    place = policies.index(baseline)

    def over_seeds(value: Callable[[Run], float]) -> dict[str, Interval]:
        values = [[value(run) for run in whole[name]] for name in policies]
        return dict(zip(policies, paired_intervals(values, place, confidence=confidence), strict=True))

    loss, area = over_seeds(lambda run: run.held_out[-1][1]), over_seeds(lambda run: area_under(run.held_out))
    own = over_seeds(_fall) if all(run.own is not None for name in policies for run in whole[name]) else {}
    by_row = {name: _after(whole[name], counts) for name in policies}
    return [
        Gap(
            policy=name,
            baseline=baseline,
            loss_over_seeds=loss[name],
            loss_over_problems=clustered_interval(
                lambda gaps: float(gaps.mean()), groups, by_row[name] - by_row[baseline], confidence=confidence
            ),
            area=area[name],
            own_fall=own.get(name),
        )
        for name in others
    ]


def _after(runs: Sequence[Run], counts: NDArray[np.bool_]) -> Floats:
    """``[R]`` each measured trajectory's nll at the end, mean over seeds."""
    return np.mean([run.nll_after for run in runs], axis=0)[counts]


def _worth(
    whole: dict[str, list[Run]], contenders: Sequence[str], groups: NDArray[np.str_], counts: NDArray[np.bool_]
) -> Worth | None:
    """None without buckets, or where a run of one blew up."""
    names = [name for name in contenders if name.startswith(BUCKET)]
    if not names or any(name not in whole for name in names):
        return None
    ranks = (np.arange(len(names)) + 0.5) / len(names)
    gains = np.array([[run.held_out[0][1] - run.held_out[-1][1] for run in whole[name]] for name in names])
    by_row = [
        np.mean([run.nll_before for run in whole[name]], axis=0)[counts] - _after(whole[name], counts) for name in names
    ]
    centred = ranks - ranks.mean()

    def slope(*columns: Floats) -> float:
        return float(centred @ [column.mean() for column in columns] / (centred @ centred))

    return Worth(
        ranks=tuple(ranks.tolist()),
        gains=tuple(t_interval(own) for own in gains),
        slope_over_seeds=slope_interval(ranks, gains),
        slope_over_problems=clustered_interval(slope, groups, *by_row),
        correlation=float(np.mean([rank_correlation(ranks, gains[:, seed]) for seed in range(gains.shape[1])])),
    )
