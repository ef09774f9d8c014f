"""``lark-fast score --dry-run``: everything but the writing, and forward passes over a few records alone."""

import math
import sys
import time
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lark_fast.pool.keys import KeyTable
from lark_fast.pool.reading import Pool
from lark_fast.progress import track
from lark_fast.scoring.feed import Trajectory
from lark_fast.scoring.head_sampling import n_drawn
from lark_fast.scoring.parts import scored_keys
from lark_fast.scoring.precision import say_fallback
from lark_fast.scoring.summary import ScoreSummary

if TYPE_CHECKING:
    from lark_fast.flop import ForwardCost
    from lark_fast.scoring.run import ScoreConfig
    from lark_fast.scoring.scorer import Scorer

SAMPLE_SECONDS = 5  # of forward passes, were they at the speed of the matmul
SAMPLE_TOKENS = 1 << 17


def dry_run(config: "ScoreConfig", pool: Pool) -> ScoreSummary:
    """Read, render and count the pool, measure the student's speed on its first records, say what a run will take."""
    from lark_fast.flop import matmul_ceiling
    from lark_fast.scoring.estimate import estimate
    from lark_fast.scoring.local import local_pieces
    from lark_fast.scoring.run import Rejects, load_scorer, make_feed
    from lark_fast.scoring.team import choose_devices

    if config.engine != "local":
        print("lark-fast: the estimate is of one device of this machine; a dry run asks no cluster", file=sys.stderr)
    if config.race is not None:
        print(
            "lark-fast: the estimate is of a run without --race; what a race spares, the race alone tells",
            file=sys.stderr,
        )
    chosen = config.engine == "local" and config.devices
    devices = choose_devices(config.devices, config.device) if chosen else [config.device]
    scorer = load_scorer(replace(config, device=devices[0]))
    student = scorer.student
    side_by_side = len(devices) if student.device.type == "cuda" else 1  # processes on a CPU share its cores
    summary = ScoreSummary(out=config.out, dry_run=True, share=pool.share)
    summary.ceiling = matmul_ceiling(student.device, scorer.product_dtype)
    say_fallback(scorer.precision_fault, str(student.dtype).removeprefix("torch."))
    rejects = Rejects(config, summary)
    feed = make_feed(config, pool, scorer.renderer, student.device.type, _known(config), rejects)
    lengths, sample, sample_tokens = array("i"), [], 0
    account, cost, local_flop = summary.account, scorer.cost, 0.0
    started = time.monotonic()
    with track("rendering", pool.total_bytes) as progress:
        for item in feed:
            lengths.append(len(item.input_ids))
            n_scored = int(np.count_nonzero(item.labels >= 0))
            account.scored_tokens += n_scored
            account.head_tokens += _n_head(n_scored, config.head_share)
            if config.local_steps is not None:
                pieces = local_pieces(item.labels, item.step_starts, config.local_steps)
                own = [piece.n_tokens for piece in pieces]
                account.local_tokens += sum(own)
                local_flop += cost.flop(own, sum(piece.n_scored for piece in pieces))
            if sample_tokens < SAMPLE_TOKENS:
                sample.append(item)
                sample_tokens += len(item.input_ids)
            progress.update(item.position, f"{len(lengths):,} records")
    account.seconds = time.monotonic() - started
    account.records, account.kept, account.scored = feed.records, feed.kept, feed.yielded
    account.input_tokens = account.rendered_tokens = feed.input_tokens
    account.render_seconds, summary.truncated = feed.render_seconds, feed.truncated
    summary.estimate = estimate(
        cost,
        np.asarray(lengths),
        account.head_tokens,
        side_by_side * _speed(scorer, cost, sample, summary.ceiling),
        footprint=scorer.footprint,
        tokens_per_batch=scorer.tokens_per_batch,
        per_token=config.per_token,
        paired=config.after is not None,
        local_tokens=account.local_tokens,
        local_flop=local_flop,
    )
    return summary


def _known(config: "ScoreConfig") -> KeyTable:
    """What a run would find in its directory, as far as whole windows go."""
    known = KeyTable()
    if not config.overwrite:
        for key, content in scored_keys(config.out):
            known.add(key, content, met=False)
    return known


def _n_head(n_scored: int, share: float | None) -> int:
    return n_scored if share is None else n_drawn(n_scored, share)


def _speed(scorer: "Scorer", cost: "ForwardCost", sample: list[Trajectory], ceiling: float) -> float:
    """FLOP/s of forward passes over the sample's first trajectories; NaN where there are none."""
    flop, chosen = 0.0, []
    for item in sample:
        n_head = _n_head(int(np.count_nonzero(item.labels >= 0)), scorer.head_share)
        own = cost.flop([len(item.input_ids)], n_head)
        if chosen and flop + own > SAMPLE_SECONDS * ceiling:
            break
        chosen.append(item)
        flop += own
    if not chosen:
        return math.nan
    seconds = []
    # The first time, libraries choose their kernels.
    for part in (chosen[:1], chosen):
        started = time.perf_counter()
        scorer.score_rendered(part)
        seconds.append(time.perf_counter() - started)
    return flop / seconds[1]
