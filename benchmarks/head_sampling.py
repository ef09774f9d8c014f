"""``python -m benchmarks.head_sampling --student DIR --pool FILE --out FILE``: what ``score --head-share`` costs.

One full pass keeps every token's statistics, and each share is replayed from them: what a run with it would have
stored, since the sample is of positions and a position's statistics do not depend on which others meet the head.
Besides the draw that a run makes (by its token hashes), others, so that chance is not taken for a result. Of a student
of 0.5B shapes with 151,936 words FLOP are computed, and a pass through a few of its layers is timed (``--layers``).
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.passes import record
from benchmarks.record_head import record_head
from benchmarks.workload import QWEN_HALF_B, QWEN_VOCABULARY, cost_of, student
from lark_fast import Scorer
from lark_fast.files import write_json
from lark_fast.flop import ForwardCost
from lark_fast.hashing import hash_fields
from lark_fast.pool.reading import Pool, Rejected
from lark_fast.pool.records import Record
from lark_fast.rendering.renderer import RenderOptions
from lark_fast.scoring.agreement import Scores, agreement
from lark_fast.scoring.head_sampling import estimate, n_drawn, sample_rows, strata
from lark_fast.scoring.learnability import g_hat, g_hat_se
from lark_fast.scoring.scorer import TrajectoryStats

SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
TIMED_ANSWERS, TIMED_PROMPT, TIMED_ROUNDS = (512, 512), 64, 3  # tokens; rounds, of which the quickest counts


def main() -> None:
    """Score, replay, time, write the record."""
    options = _options()
    scorer = Scorer.from_pretrained(
        options.student, device="cpu", dtype="float32", options=RenderOptions(max_length=options.max_length)
    )
    records = list(_records(options))
    started = time.monotonic()
    scored = scorer.score_rendered([scorer.renderer(one) for one in records])
    seconds = time.monotonic() - started
    problem = [str(one.problem_id) for one in records]
    costs = {"student": ForwardCost.of(scorer.student.model), "half_b": cost_of(QWEN_HALF_B, QWEN_VOCABULARY)}
    made = {
        **record_head(options),
        "problems": len(set(problem)),
        "trajectories": len(records),
        "input_tokens": sum(one.n_input_tokens for one in scored),
        "scored_tokens": sum(one.n_tokens for one in scored),
        "full_pass_seconds": round(seconds, 1),
        "draws": options.draws,
        "shares": [share_of(scored, problem, share, costs, options.draws, options.budget) for share in SHARES],
    }
    if options.layers:
        made["measured"] = timed(options.layers)
    write_json(options.out, made)
    print(json.dumps(made, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head_sampling", description=__doc__.partition("\n")[0])
    parser.add_argument("--student", required=True, metavar="DIR")
    parser.add_argument("--pool", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    parser.add_argument("--commit", required=True, metavar="SHA", help="of the code that runs")
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--skip", type=int, default=0, help="problems before them")
    parser.add_argument("--candidates", type=int, default=1000, help="at most so many of a problem")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--budget", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2, help="of the pass that is timed; 0: none is")
    return parser.parse_args()


def _records(options: argparse.Namespace) -> Iterator[Record]:
    """The first candidates of so many problems."""
    taken: dict[Any, int] = {}
    for raw in Pool((options.pool,)).read_raw():
        one = raw.parse()
        if isinstance(one, Rejected):
            continue
        if one.problem_id not in taken and len(taken) == options.skip + options.problems:
            continue
        taken[one.problem_id] = taken.get(one.problem_id, 0) + 1
        place = list(taken).index(one.problem_id)
        if place >= options.skip and taken[one.problem_id] <= options.candidates:
            yield one


def share_of(
    scored: Sequence[TrajectoryStats],
    problem: Sequence[str],
    share: float,
    costs: dict[str, ForwardCost],
    draws: int,
    budget: int,
) -> dict[str, Any]:
    """One share against all positions: mean over draws, and the first draw, which is a run's own, by itself."""
    values = [np.stack([one.tokens.nll.double().numpy(), one.tokens.brier.double().numpy()]) for one in scored]
    exact = np.array([row.mean(axis=1) for row in values])
    true_g = g_hat(*exact.T, problem)
    lengths = [one.n_input_tokens for one in scored]
    n_scored, n_head = (sum(numbers) for numbers in zip(*_counts(scored, share), strict=True))
    agreements, off, inside, errors = [], [], [], []
    for number in range(draws):
        means, covariance = replayed(scored, values, share, number)
        error = np.sqrt(covariance[:, [0, 1], [0, 1]])
        own = g_hat_se(*means.T, problem, *error.T, covariance[:, 0, 1], origin=_first_alike(scored, problem))
        apart = np.column_stack([means - exact, g_hat(*means.T, problem) - true_g])
        error = np.column_stack([error, own])
        agreements.append(agreement(Scores(*exact.T), Scores(*means.T), problem, budget))
        off.append(apart)
        errors.append(error)
        inside.append(np.where(error > 0, np.abs(apart) <= 2 * error, np.nan))
    off, errors, inside = (np.array(part) for part in (off, errors, inside))  # [draws, N, 3]
    names = ("nll", "brier", "g_hat")
    rms, told = (np.sqrt(np.nanmean(part**2, axis=(0, 1))) for part in (off, errors))
    spread = np.nanstd(np.column_stack([exact, true_g]), axis=0)
    relative = np.median(errors[0, :, :2] / exact, axis=0)
    return {
        "share": share,
        "head_share": round(n_head / n_scored, 4),
        "flop_share": {
            name: round(cost.flop(lengths, n_head) / cost.flop(lengths, n_scored), 4) for name, cost in costs.items()
        },
        "rms_error": dict(zip(names, rms.tolist(), strict=True)),
        "rms_standard_error": dict(zip(names, told.tolist(), strict=True)),
        "standard_deviation_in_pool": dict(zip(names, spread.tolist(), strict=True)),
        "median_relative_standard_error": dict(zip(names, relative.tolist(), strict=False)),
        "within_2_standard_errors": dict(zip(names, np.nanmean(inside, axis=(0, 1)).tolist(), strict=True)),
        "variance_over_simple_random_sample": _over_simple(values, share),
        "spearman_g_hat": _mean([one.g_hat.spearman for one in agreements]),
        "spearman_g_hat_within_problems": _mean([one.g_hat_within for one in agreements]),
        "same_top": _mean([one.same_top for one in agreements]),
        "total_variation": _mean([one.total_variation for one in agreements]),
        "a_run": agreements[0].as_json(),
    }


def replayed(
    scored: Sequence[TrajectoryStats], values: Sequence[NDArray[np.float64]], share: float, number: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means ``[N, 2]`` and covariances ``[N, 2, 2]`` by the draw of that number; 0 is what a run draws."""
    made = []
    for one, row in zip(scored, values, strict=True):
        digest = one.token_hash if not number else hash_fields(one.token_hash, str(number).encode(), size=16)
        made.append(estimate(row[:, sample_rows(one.n_tokens, share, digest)], one.n_tokens))
    means, covariances = zip(*made, strict=True)
    return np.array(means), np.array(covariances)


def _counts(scored: Sequence[TrajectoryStats], share: float) -> list[tuple[int, int]]:
    return [(one.n_tokens, n_drawn(one.n_tokens, share)) for one in scored]


def _first_alike(scored: Sequence[TrajectoryStats], problem: Sequence[str]) -> list[int]:
    first: dict[tuple[str, bytes], int] = {}
    return [
        first.setdefault((of, one.token_hash), row) for row, (one, of) in enumerate(zip(scored, problem, strict=True))
    ]


def _over_simple(values: Sequence[NDArray[np.float64]], share: float) -> dict[str, float]:
    """Variance of the estimates over that of a simple random sample of as many positions, mean over trajectories."""
    ratios = []
    for row in values:
        n = row.shape[1]
        m = n_drawn(n, share)
        if m == n:
            continue
        sizes, draws = strata(n, m)
        parts = np.split(row, np.cumsum(sizes)[:-1], axis=1)
        within = np.array([part.var(axis=1, ddof=1) for part in parts])  # [H, 2]
        ours = ((sizes / n) ** 2 * (1 - draws / sizes) / draws) @ within
        ratios.append(ours / (row.var(axis=1, ddof=1) / m * (1 - m / n)))
    return dict(zip(("nll", "brier"), np.mean(ratios, axis=0).tolist(), strict=True))


def timed(layers: int) -> dict[str, Any]:
    """A pass of a student with a 0.5B student's width and words and so many of its layers, at every share."""
    sizes = QWEN_HALF_B | {"num_hidden_layers": layers}
    model = student(sizes, QWEN_VOCABULARY, torch.float32)
    rng = np.random.default_rng(0)
    rendered = [
        record(rng.integers(0, QWEN_VOCABULARY, TIMED_PROMPT + answer).tolist(), TIMED_PROMPT)
        for answer in TIMED_ANSWERS
    ]
    cost, lengths = ForwardCost.of(model), [len(one.input_ids) for one in rendered]
    scorers = {share: Scorer(model, head_share=share) for share in (None, *SHARES)}
    seconds: dict[float | None, list[float]] = {share: [] for share in scorers}
    for _ in range(TIMED_ROUNDS):  # in turn, so that what else the machine does hits all alike
        for share, scorer in scorers.items():
            started = time.perf_counter()
            scored = scorer.score_rendered(rendered)
            seconds[share].append(time.perf_counter() - started)
            assert share is None or all(one.n_head == n_drawn(one.n_tokens, share) for one in scored)
    full = cost.flop(lengths, sum(TIMED_ANSWERS))
    return {
        "sizes": sizes,
        "vocabulary": QWEN_VOCABULARY,
        "input_tokens": sum(lengths),
        "scored_tokens": sum(TIMED_ANSWERS),
        "threads": torch.get_num_threads(),
        "seconds": {str(share): round(min(runs), 3) for share, runs in seconds.items()},
        "time_share": {str(share): round(min(seconds[share]) / min(seconds[None]), 3) for share in SHARES},
        "flop_share": {
            str(share): round(cost.flop(lengths, sum(n_drawn(n, share) for n in TIMED_ANSWERS)) / full, 3)
            for share in SHARES
        },
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


if __name__ == "__main__":
    main()
