"""What the figures of a diagnosis mean, in sentences made of them."""

import math
from collections.abc import Iterator

from lark_fast.diagnosis.config import FEWEST_PROBLEMS
from lark_fast.diagnosis.measures import BY_LOT, FAR_OUT, Agreement, Measures, Pace
from lark_fast.intervals import Interval, told
from lark_fast.selection.policies import RANDOM

CONSTANT = 2.0  # a spread up to which something may pass for a constant
NEGLIGIBLE_SHARE = 0.1  # of |grad L_q|^2, for cross terms that may be left out
FAIR, PARTLY = 0.7, 0.3  # rank correlations
AS_FORETOLD = (0.8, 1.25)  # measured over foretold rates


def verdict(measured: Measures, *, lr: float) -> list[str]:
    """Sentences, the last of which is the answer to whether g_hat can be trusted here."""
    left_out = len(measured.not_finite)
    said = []
    if left_out:
        said.append(
            f"The loss or gradient of {left_out:,} trajectories is not finite ({measured.not_finite[0]} first); they "
            "are left out."
        )
    if measured.problems < FEWEST_PROBLEMS:
        said.append(
            f"Too small to say anything: {measured.problems:,} problem(s) with two candidates or more, where "
            f"{FEWEST_PROBLEMS} is the least that intervals over problems mean something for. The figures describe "
            "these problems and no others."
        )
        return said
    return [*said, *_assumptions(measured), *_agreement(measured), *_steps(measured, lr), _answer(measured)]


def find(measured: Measures, estimate: str, target: str) -> Agreement:
    """One of the comparisons."""
    return next(one for one in measured.agreements if (one.estimate, one.target) == (estimate, target))


def _assumptions(measured: Measures) -> Iterator[str]:
    kappa, overlap = measured.kappa, measured.overlap
    steady = "is hardly a constant"
    if kappa.spread.high <= CONSTANT:
        steady = "may pass for a constant"
    elif kappa.spread.low > CONSTANT:
        steady = "is not constant"
    length = ""
    if kappa.slope.sign:
        length = (
            f" It {'falls' if kappa.slope.sign < 0 else 'grows'} with length, as tokens^{told(kappa.slope)}, which "
            f"explains {kappa.explained.mean:.0%} of its variance; beside that line it spreads by a factor of "
            f"{told(kappa.spread_at_length, 1)}."
        )
    yield (
        f"kappa = |grad nll|^2 / Brier {steady}: its 90th percentile is {told(kappa.spread, 1)} times its 10th, and in "
        f"the median problem the largest is {told(kappa.within, 1)} times the smallest.{length}"
    )
    if measured.outliers:
        yield (
            f"{len(measured.outliers):,} trajectories have a kappa more than {FAR_OUT} times the median or less than a "
            f"{FAR_OUT}th of it ({measured.outliers[0]} first): look at them, for few can decide the line."
        )
    share = overlap.share
    held = "may overlap or not"
    if max(abs(share.low), abs(share.high)) <= NEGLIGIBLE_SHARE:
        held = "are nearly orthogonal"
    elif share.sign:
        held = "are not orthogonal"
    yield (
        f"Gradients of a problem's candidates {held}: their cosine is {told(overlap.within_mean)} on average (across "
        f"problems {told(overlap.across_mean)}), and cross terms are {_percent(share)} of |grad L|^2."
    )


def _agreement(measured: Measures) -> Iterator[str]:
    ours = find(measured, "g_hat", "dR/dq")
    best = ""
    if math.isfinite(ours.by_chance):  # some problem has more candidates than the budget
        best = f"; {_percent(ours.top)} of the best are the same, where lots would give {ours.by_chance:.0%}"
    yield (
        f"{_how('g_hat', 'the exact dR/dq', ours.spearman)}: Spearman {told(ours.spearman)}, Pearson "
        f"{told(ours.pearson)} within problems{best}."
    )
    norms, short = find(measured, "g_hat with exact |grad nll|^2", "dR/dq"), find(measured, "shortness", "dR/dq")
    corrected = find(measured, "g_hat with Brier x tokens^slope", "dR/dq")
    yield (
        f"With the exact |grad nll|^2 for kappa x Brier it would be {told(norms.spearman)}, with kappa by length alone "
        f"{told(corrected.spearman)}; taking the shortest gives {told(short.spearman)}."
    )


def _steps(measured: Measures, lr: float) -> Iterator[str]:
    steps, ratio = measured.adamw, measured.descent.ratio
    if math.isfinite(ratio.mean) and not AS_FORETOLD[0] <= ratio.mean <= AS_FORETOLD[1]:
        yield (
            f"A small step of plain descent takes {told(ratio)} times as much off a loss as its gradient foretells: "
            "steps overshoot, or are lost in the digits of the parameters (--dtype float32)."
        )
    if steps.too_small:
        yield (
            f"Steps of AdamW at lr {lr:g} are lost in rounding in {steps.still:,} of {steps.runs:,} runs, whose loss "
            "hardly moved, so there is no rate to speak of. Raise --lr, or give --dtype float32."
        )
        return
    if steps.too_large:
        yield (
            f"AdamW at lr {lr:g} is too large for this student: the loss rose, or was not finite, on {steps.rose:,} of "
            f"{steps.runs:,} runs, so there is no rate to speak of. Lower --lr."
        )
        return
    ours, short = find(measured, "rho", "AdamW's rate"), find(measured, "shortness", "AdamW's rate")
    yield (
        f"{_how('rho', 'the rate at which the loss of each falls over real steps', ours.spearman)} (AdamW, lr "
        f"{lr:g}): Spearman {told(ours.spearman)}; shortness {told(short.spearman)}."
    )
    beside = {RANDOM: "a random choice of as many", BY_LOT: "the same weights dealt to candidates by lot"}
    for pace in measured.paces:
        if pace.beside in beside:  # the tables have the others, which compare weightings of unequal sizes
            yield (
                f"The loss that {pace.policy} weights falls {_pace(pace)} times as fast over AdamW steps as with "
                f"{beside[pace.beside]}."
            )


def _pace(pace: Pace) -> str:
    left_out = f" without {pace.left_out} problems where a loss did not fall" if pace.left_out else ""
    return f"{told(pace.adamw)}{left_out} (by exact gradients: {told(pace.exact)})"


def _answer(measured: Measures) -> str:
    ours = find(measured, "g_hat", "dR/dq").spearman
    if math.isnan(ours.mean):
        return "No problem's candidates differ in g_hat: there is nothing to choose by."
    if ours.sign == 0:
        return (
            "In all: this sample does not show that g_hat says anything about what this student learns fastest. A "
            "larger --problems, in a directory of its own, would tell more; lark-fast pilot tells whether learning "
            "it helps."
        )
    if ours.sign < 0:
        return "In all: g_hat orders these candidates the wrong way round. Do not select by it for this student."
    strength = "a fair" if ours.mean >= FAIR else "a weak" if ours.mean < PARTLY else "some"
    return (
        f"In all: g_hat is {strength} guide to what this student learns fastest here. Whether learning it helps on "
        "other problems is another question: lark-fast pilot answers that."
    )


def _how(estimate: str, target: str, interval: Interval) -> str:
    if interval.sign == 0:
        return f"In this sample {estimate} tells nothing of the order of candidates by {target}"
    if interval.sign < 0:
        return f"{estimate} orders candidates contrary to {target}"
    much = "much as" if interval.mean >= FAIR else "a little as" if interval.mean < PARTLY else "in part as"
    return f"{estimate} orders candidates {much} {target} does"


def _percent(interval: Interval) -> str:
    if math.isnan(interval.mean):
        return "unknown"
    if math.isnan(interval.low):
        return f"{interval.mean:.0%}"
    return f"{interval.mean:.0%} ({interval.low:.0%} to {interval.high:.0%})"
