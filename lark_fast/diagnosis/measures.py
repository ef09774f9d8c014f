"""From the finished problems of a diagnosis to figures with intervals over problems. Numbers in, numbers out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lark_fast.diagnosis.exact import cosines, cross_share, rate_gradient, relative_rate
from lark_fast.intervals import Interval, clustered_interval, mean_interval
from lark_fast.ranks import rank_correlation
from lark_fast.scoring.learnability import g_hat, measured_rate, rho

Floats = NDArray[np.float64]
Line = Mapping[str, Any]

FULL, BY_LOT = "full", "chi2 by lot"
PACES = (("chi2", FULL), ("random", FULL), ("topb", "random"), ("chi2", BY_LOT))  # what is compared with what
WIDE = (0.1, 0.9)  # quantiles that tell how far something spreads
# Of a loss: what rounding may move it by, relative.
NOISE = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-3}
FAR_OUT = 10
_FEW = 0.1  # of the runs, that may go wrong
_NOTHING = Interval(mean=math.nan, low=math.nan, high=math.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kappa:
    """|grad nll|^2 / brier, which the paper takes for a constant.

    Attributes:
        values, tokens: ``[C]`` of every trajectory that has a Brier score above 0.
        median: of them.
        spread: the ninetieth percentile over the tenth.
        within: the largest over the smallest of a problem's candidates, at the median problem.
        slope: of log kappa by log tokens; -1 where a trajectory's tokens have orthogonal gradients.
        explained: share of the variance of log kappa that the line explains.
        spread_at_length: ``spread`` of what is left beside the line.
    """

    values: tuple[float, ...]
    tokens: tuple[int, ...]
    median: Interval
    spread: Interval
    within: Interval
    slope: Interval
    explained: Interval
    spread_at_length: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Inner products between trajectories, which the paper takes for 0.

    Attributes:
        within: ``[pairs]`` cosines between candidates of one problem.
        across: ``[pairs]`` cosines between a problem's candidates and one of another problem.
        within_mean, across_mean: their means over problems.
        share: of |grad L_q|^2 at uniform q, what is not sum q_k^2 |grad nll_k|^2.
    """

    within: tuple[float, ...]
    across: tuple[float, ...]
    within_mean: Interval
    across_mean: Interval
    share: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How one number orders a problem's candidates beside another; means over problems in which both vary.

    Attributes:
        top: share of the B best by one that are among the B best by the other; where there are more than B.
        by_chance: what drawing lots would give.
    """

    estimate: str
    target: str
    problems: int
    spearman: Interval
    pearson: Interval
    top: Interval
    by_chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast the loss that a policy weights falls, as a multiple of that of another weighting.

    Attributes:
        exact: the ratio of R(q), geometric mean over problems.
        descent, adamw: the same of the rates measured over real steps.
        problems, left_out: in which both weigh; of these, without AdamW's rate, for a loss did not fall.
    """

    policy: str
    beside: str
    problems: int
    left_out: int
    exact: Interval
    descent: Interval
    adamw: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What real steps did.

    Attributes:
        runs: trajectories and weightings that were trained on.
        rose: of these, those whose loss was higher afterwards, or not finite.
        still: those whose loss moved by no more than rounding moves it.
        ratio: measured rate over the one that gradient flow foretells, of trajectories alone: median over problems.
    """

    runs: int
    rose: int
    still: int
    ratio: Interval

    @property
    def too_large(self) -> bool:
        """The steps overshoot, so that there is no rate to speak of."""
        return self.rose > _FEW * self.runs

    @property
    def too_small(self) -> bool:
        """The steps are lost in rounding, so that there is no rate to speak of."""
        return self.still > _FEW * self.runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """All of it."""

    problems: int
    trajectories: int
    tokens: int  # scored
    not_finite: tuple[str, ...]  # file and line of trajectories that were left out
    outliers: tuple[str, ...]  # of those whose kappa is more than FAR_OUT times the median, or its FAR_OUTth
    kappa: Kappa
    overlap: Overlap
    agreements: tuple[Agreement, ...]
    descent: Steps
    adamw: Steps
    paces: tuple[Pace, ...]


def measure(lines: Sequence[Line], *, budget: int, dtype: str = "float32") -> Measures:
    """Measure.

    Args:
        lines: of problems.jsonl, one or more with one or more candidates.
        budget: B of the agreement of the best.
        dtype: of the student, which decides how small a change of a loss means nothing.
    """
    not_finite = tuple(name for line in lines for name in line["not_finite"])
    lines = [line for line in lines if line["nll"]]
    several = [line for line in lines if len(line["nll"]) > 1]
    kappa = _kappa(lines)
    return Measures(
        problems=len(several),
        trajectories=sum(len(line["nll"]) for line in lines),
        tokens=sum(int(_tokens(line).sum()) for line in lines),
        not_finite=not_finite,
        outliers=tuple(_outliers(lines, kappa.median.mean)),
        kappa=kappa,
        overlap=_overlap(lines),
        agreements=tuple(_agreements(several, kappa.slope.mean, budget)),
        descent=_steps(lines, "sgd", NOISE[dtype]),
        adamw=_steps(lines, "adamw", NOISE[dtype]),
        paces=tuple(_paces(several)),
    )


def _tokens(line: Line) -> Floats:
    return np.array([candidate["n_tokens"] for candidate in line["candidates"]], dtype=np.float64)


def _kappa(lines: Sequence[Line]) -> Kappa:
    groups, values, tokens = [], [], []
    for number, line in enumerate(lines):
        brier, norms = np.array(line["brier"]), np.diag(np.array(line["gram"]))
        some = (brier > 0) & (norms > 0)
        groups += [number] * int(some.sum())
        values += (norms[some] / brier[some]).tolist()
        tokens += _tokens(line)[some].tolist()
    if not values:
        return Kappa(values=(), tokens=(), **dict.fromkeys(_KAPPA, _NOTHING))
    log, log_tokens = np.log(values), np.log(tokens)
    found = {
        "median": clustered_interval(lambda kappa: math.exp(np.median(kappa)), groups, log),
        "spread": clustered_interval(_spread, groups, log),
        "within": _within(log, np.array(groups)),
        "slope": clustered_interval(lambda kappa, length: _line(kappa, length)[0], groups, log, log_tokens),
        "explained": clustered_interval(_explained, groups, log, log_tokens),
        "spread_at_length": clustered_interval(
            lambda kappa, length: _spread(kappa - np.polyval(_line(kappa, length), length)), groups, log, log_tokens
        ),
    }
    return Kappa(values=tuple(values), tokens=tuple(map(int, tokens)), **found)


_KAPPA = ("median", "spread", "within", "slope", "explained", "spread_at_length")


def _outliers(lines: Sequence[Line], median: float) -> Iterator[str]:
    for line in lines:
        for one, brier, norm in zip(line["candidates"], line["brier"], np.diag(np.array(line["gram"])), strict=True):
            if brier > 0 and not median / FAR_OUT <= norm / brier <= median * FAR_OUT:
                yield f"{one['source']}:{one['line']}"


def _spread(log: Floats) -> float:
    low, high = np.quantile(log, WIDE)
    return math.exp(high - low)


def _within(log: Floats, groups: NDArray[np.int64]) -> Interval:
    problems = np.unique(groups)
    ratios = [np.ptp(log[groups == group]) for group in problems]
    return clustered_interval(lambda own: math.exp(np.median(own)), problems, ratios)


def _line(log: Floats, log_tokens: Floats) -> Floats:
    """Slope and offset by least squares; NaN where all are of one length."""
    if np.ptp(log_tokens) == 0:
        return np.array([math.nan, math.nan])
    return np.polyfit(log_tokens, log, 1)


def _explained(log: Floats, log_tokens: Floats) -> float:
    if np.ptp(log) == 0 or np.ptp(log_tokens) == 0:
        return math.nan
    return float(np.corrcoef(log, log_tokens)[0, 1] ** 2)


def _overlap(lines: Sequence[Line]) -> Overlap:
    within, across, shares = [], [], []
    for line in lines:
        gram, stranger = np.array(line["gram"]), line["stranger"]
        if len(gram) > 1:
            within.append(_finite(cosines(gram)))
            shares.append(cross_share(gram, np.full(len(gram), 1 / len(gram))))
        if stranger["products"] is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                norms = np.sqrt(np.diag(gram) * stranger["squared_norm"])
                across.append(_finite(np.array(stranger["products"]) / norms))
    return Overlap(
        within=tuple(float(cosine) for own in within for cosine in own),
        across=tuple(float(cosine) for own in across for cosine in own),
        within_mean=_mean([own.mean() for own in within if len(own)]),
        across_mean=_mean([own.mean() for own in across if len(own)]),
        share=_mean(_finite(np.array(shares))),
    )


def _agreements(lines: Sequence[Line], slope: float, budget: int) -> list[Agreement]:
    """The pairs of numbers that are compared, a line a pair."""

    def exact(line: Line) -> Floats:
        size = len(line["nll"])
        return rate_gradient(line["gram"], line["nll"], np.full(size, 1 / size))

    def orthogonal(line: Line) -> Floats:
        size = len(line["nll"])
        return rate_gradient(np.diag(np.diag(np.array(line["gram"]))), line["nll"], np.full(size, 1 / size))

    def factor(line: Line) -> Floats:
        return np.diag(np.array(line["gram"])) / np.array(line["nll"])

    def scored(line: Line, power: float = 0.0) -> Floats:
        brier = np.array(line["brier"]) * _tokens(line) ** power
        return g_hat(line["nll"], brier, np.zeros(len(brier)))

    def alone(optimizer: str) -> Callable[[Line], Floats]:
        return lambda line: np.array([_rate(run) for run in line["steps"][optimizer]["alone"]])

    def shortness(line: Line) -> Floats:
        return -_tokens(line)

    def proxy(line: Line) -> Floats:
        return rho(line["nll"], line["brier"])

    derivative, learnability, adamw = "dR/dq", "|grad nll|^2 / nll", "AdamW's rate"
    pairs = [
        ("g_hat", scored, derivative, exact),
        ("g_hat with exact |grad nll|^2", orthogonal, derivative, exact),
        ("g_hat with Brier x tokens^slope", lambda line: scored(line, slope), derivative, exact),
        ("nll", lambda line: np.array(line["nll"]), derivative, exact),
        ("shortness", shortness, derivative, exact),
        ("rho", proxy, learnability, factor),
        ("shortness", shortness, learnability, factor),
        ("rho", proxy, adamw, alone("adamw")),
        ("|grad nll|^2 / nll", factor, adamw, alone("adamw")),
        ("shortness", shortness, adamw, alone("adamw")),
    ]
    return [_agreement(lines, *pair, budget) for pair in pairs]


def _agreement(
    lines: Sequence[Line],
    estimate: str,
    estimated: Callable[[Line], Floats],
    target: str,
    true: Callable[[Line], Floats],
    budget: int,
) -> Agreement:
    spearman, pearson, top, lots = [], [], [], []
    for line in lines:
        ours, theirs = estimated(line), true(line)
        some = np.isfinite(ours) & np.isfinite(theirs)
        ours, theirs = ours[some], theirs[some]
        if len(ours) < 2 or np.ptp(ours) == 0 or np.ptp(theirs) == 0:
            continue
        spearman.append(rank_correlation(ours, theirs))
        pearson.append(np.corrcoef(ours, theirs)[0, 1])
        if len(ours) > budget:
            best = [set(np.argsort(-values, kind="stable")[:budget].tolist()) for values in (ours, theirs)]
            top.append(len(best[0] & best[1]) / budget)
            lots.append(budget / len(ours))
    return Agreement(
        estimate=estimate,
        target=target,
        problems=len(spearman),
        spearman=_mean(spearman, (-1.0, 1.0)),
        pearson=_mean(pearson, (-1.0, 1.0)),
        top=_mean(top, (0.0, 1.0)),
        by_chance=float(np.mean(lots)) if lots else math.nan,
    )


def _steps(lines: Sequence[Line], optimizer: str, noise: float) -> Steps:
    runs = rose = still = 0
    ratios, groups = [], []
    for number, line in enumerate(lines):
        taken = line["steps"][optimizer]
        every = [*taken["alone"], *(run for name, run in taken.items() if name != "alone")]
        runs += len(every)
        finite = [run for run in every if run["after"] is not None and run["before"] is not None]
        moved = np.array([run["after"] / run["before"] - 1 for run in finite])
        rose += len(every) - len(finite) + int((moved > noise).sum())
        still += int((np.abs(moved) <= noise).sum())
        foretold = np.diag(np.array(line["gram"])) / np.array(line["nll"])
        with np.errstate(divide="ignore", invalid="ignore"):
            own = np.array([_rate(run) / run["lr"] if run["lr"] else math.nan for run in taken["alone"]]) / foretold
        ratios += _finite(own).tolist()
        groups += [number] * len(_finite(own))
    ratio = clustered_interval(lambda values: float(np.median(values)), groups, ratios) if ratios else _NOTHING
    return Steps(runs=runs, rose=rose, still=still, ratio=ratio)


def _paces(lines: Sequence[Line]) -> Iterator[Pace]:
    """Of the problems that have more candidates than the budget."""
    for pair in PACES:
        exact, measured = [], {"sgd": [], "adamw": []}
        for line in lines:
            if any(name not in line["weights"] for name in pair):
                continue
            exact.append(_log_ratio(*(relative_rate(line["gram"], line["nll"], line["weights"][q]) for q in pair)))
            for optimizer, ratios in measured.items():
                # Descent takes a step size that suits the weights, and a rate is by step size.
                runs = [line["steps"][optimizer][q] for q in pair]
                ratios.append(_log_ratio(*(_rate(run) / run["lr"] if run["lr"] else math.nan for run in runs)))
        if exact:
            ratios = {"exact": exact, "descent": measured["sgd"], "adamw": measured["adamw"]}
            yield Pace(
                policy=pair[0],
                beside=pair[1],
                problems=len(exact),
                left_out=int(np.isnan(measured["adamw"]).sum()),
                **{name: _ratio(logs) for name, logs in ratios.items()},
            )


def _rate(run: Mapping[str, Any]) -> float:
    """rho_measured a step."""
    if run["before"] is None or run["after"] is None:
        return math.nan
    return float(measured_rate(run["before"], run["after"], run["steps"]))


def _log_ratio(ours: float, theirs: float) -> float:
    return math.log(ours / theirs) if ours > 0 and theirs > 0 else math.nan


def _ratio(logs: Sequence[float]) -> Interval:
    found = _mean(_finite(np.array(logs)))
    return Interval(mean=math.exp(found.mean), low=math.exp(found.low), high=math.exp(found.high))


def _mean(values: Sequence[float] | Floats, bounds: tuple[float, float] | None = None) -> Interval:
    """Over problems; rounding may leave a correlation a little above 1."""
    if not len(values):
        return _NOTHING
    return mean_interval(values if bounds is None else np.clip(values, *bounds), bounds=bounds)


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]
