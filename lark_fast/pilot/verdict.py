"""What a pilot's figures mean, in sentences made of them."""

from collections.abc import Iterator, Sequence

from lark_fast.intervals import told
from lark_fast.pilot.config import FEWEST_PROBLEMS, FEWEST_STEPS
from lark_fast.pilot.measures import Gap, Measures, Worth


def verdict(
    measured: Measures,
    *,
    trained_problems: int,
    held_out_problems: int,
    seeds: int,
    steps: int,
    budget: int,
    take_all: Sequence[str],
) -> list[str]:
    """Sentences; where nothing separates the policies, one says so.

    Args:
        measured: the figures.
        trained_problems, held_out_problems, seeds: what they are of.
        steps: of the shortest run.
        budget: candidates that a policy keeps of a problem.
        take_all: policies that keep every candidate of every problem, alike.
    """
    said = list(_diverged(measured))
    if len(take_all) > 1:
        said.append(
            f"{_and(list(take_all))} are one selection: no problem has more candidates than the budget of {budget}, "
            "so all are kept. Lower --budget, or compare on a pool with more."
        )
    if steps < FEWEST_STEPS:
        said.append(
            f"The shortest run has {steps} step(s), which hardly trains: raise --tokens, or lower --global-batch."
        )
    few = [
        f"{count:,} problem(s) {what}"
        for count, what in ((trained_problems, "to train on"), (held_out_problems, "held out"))
        if count < FEWEST_PROBLEMS
    ]
    if few:
        return [
            *said,
            f"Too small to say anything: {' and '.join(few)}, where {FEWEST_PROBLEMS} is the least. The figures "
            "describe these problems and no others.",
        ]
    if seeds < 2:
        return [*said, "One seed tells nothing of chance: run more (--seeds 3) before believing an order."]
    if measured.gaps:
        said += [_ends(measured.gaps), *_own(measured.gaps)]
    if measured.worth is not None:
        said.append(_worth(measured.worth))
    if not said:
        said.append("Nothing was compared: give --policies two or more.")
    return said


def _diverged(measured: Measures) -> Iterator[str]:
    blown = [one for one in measured.outcomes if one.diverged]
    if blown:
        names = ", ".join(f"{one.contender} ({one.diverged} of {one.runs})" for one in blown)
        yield f"A loss or gradient explodes in runs of {names}, which have no figures. Lower --lr."


def _ends(gaps: tuple[Gap, ...]) -> str:
    """On the held-out loss at the end."""
    baseline = gaps[0].baseline
    apart = [gap for gap in gaps if gap.loss.sign]
    alike = [gap.policy for gap in gaps if not gap.loss.sign]
    if not apart:
        far = max(gaps, key=lambda gap: abs(gap.loss.mean))
        return (
            f"Nothing separates the policies here: the held-out loss after training on {_and(alike)} cannot be told "
            f"from {baseline}'s. The largest difference is {far.policy}'s, {far.loss.mean:+.4f} nats a token "
            f"({far.loss.low:+.4f} to {far.loss.high:+.4f}; above 0 is worse). A longer run (--tokens), more seeds or "
            "more held-out problems might tell."
        )
    said = [
        f"{gap.policy} ends {'below' if gap.loss.sign < 0 else 'above'} {baseline} by {abs(gap.loss.mean):.4f} "
        "nats a token"
        for gap in apart
    ]
    rest = f"; {_and(alike)} cannot be told from it" if alike else ""
    return f"On problems that nobody trained on, {'; '.join(said)}{rest}."


def _own(gaps: tuple[Gap, ...]) -> Iterator[str]:
    """The paper's claim: loss on what is selected falls faster."""
    known = [gap for gap in gaps if gap.own_fall is not None]
    if not known:
        return
    faster, slower = ([gap.policy for gap in known if gap.own_fall.sign == sign] for sign in (1, -1))
    alike = [gap.policy for gap in known if gap.own_fall.sign == 0]
    baseline = known[0].baseline
    what = "The loss of what each policy itself selects of held-out problems"
    if not faster and not slower:
        yield f"{what} falls no faster and no more slowly than {baseline}'s, as far as can be told."
        return
    parts = [
        f"{_and(names)}'s {how} {baseline}'s"
        for names, how in ((faster, "falls faster than"), (slower, "falls more slowly than"), (alike, "as fast as"))
        if names
    ]
    yield f"{what}: {'; '.join(parts)}{', as far as can be told' if alike else ''}."


def _worth(worth: Worth) -> str:
    slope = f"{told(worth.slope, 4)} nats a token"
    if worth.slope.sign == 0:
        return (
            "g_hat's rank does not tell what training on a trajectory is worth here: from the lowest to the highest "
            f"the gain in held-out loss changes by {slope}, over seeds and problems."
        )
    more = "more" if worth.slope.sign > 0 else "less"
    return (
        f"Trajectories that g_hat ranks higher are worth {more}: from the lowest to the highest the gain in held-out "
        f"loss changes by {slope} (Spearman {worth.correlation:.2f} over {len(worth.ranks)} buckets)."
    )


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
