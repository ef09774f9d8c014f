"""``python -m benchmarks.racing --scores DIR --student DIR --pool FILE --out FILE``: what ``score --race`` would spare.

Races are replayed from a store that has every token's statistics (``score --per-token --dtype float32``), by the code
that runs them, for several budgets and risks: tokens and FLOP that would have passed, with keys and values kept and
without, beside what became of the best, of the weights, and of the audit. Beside the forecasts that the race makes,
two simpler kinds: from running means alone, and with intervals by Bernstein's inequality. And races in which the head
reads a sample, with FLOP of students in which it dominates as well.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.record_head import record_head
from benchmarks.workload import GEMMA_270M, GEMMA_VOCABULARY, QWEN_HALF_B, QWEN_VOCABULARY, cost_of
from lark_fast.batch import Targets
from lark_fast.files import write_json
from lark_fast.flop import ForwardCost
from lark_fast.pool.reading import Pool, Rejected
from lark_fast.racing.bernstein import BernsteinForecaster
from lark_fast.racing.forecast import Forecaster
from lark_fast.racing.outcome import missed_winners, proportion_interval
from lark_fast.racing.race import Race, draw_samples, replay
from lark_fast.racing.rules import RaceRules
from lark_fast.rendering.renderer import Renderer, RenderOptions
from lark_fast.scoring.agreement import Scores, agreement
from lark_fast.scoring.feed import token_hash
from lark_fast.scoring.learnability import g_hat
from lark_fast.scoring.parts import part_files
from lark_fast.student import load_student

RISKS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
FEW_RISKS = (0.05, 0.2)  # of other forecasts, and of samples
HEAD_SHARES = (1 / 2, 1 / 4, 1 / 8)
LAGS = (1, 2, 4, 8)  # tokens apart, whose residuals' correlation is recorded


class RunningMeans(Forecaster):
    """Without a table: the rest is as what has been seen, shrunk towards the problem's mean."""

    def table(self, values: NDArray[np.float64], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.zeros(len(values))


class Candidate(NamedTuple):
    """A trajectory with the statistics of its tokens."""

    words: NDArray[np.int64]
    before: NDArray[np.int64]
    rows: NDArray[np.int64]  # positions whose hidden states are scored
    nll: NDArray[np.float64]
    brier: NDArray[np.float64]
    token_hash: bytes


def main() -> None:
    """Replay, write the record."""
    options = _options()
    problems = dict(_problems(options))
    own = load_student(options.student, device="cpu", dtype="float32", tokenizer=False)
    costs = {
        "student": ForwardCost.of(own.model),
        "half_b": cost_of(QWEN_HALF_B, QWEN_VOCABULARY),
        "270m": cost_of(GEMMA_270M, GEMMA_VOCABULARY),
    }
    candidates = [one for own in problems.values() for one in own]
    made = {
        **record_head(options),
        "problems": len(problems),
        "candidates": len(candidates),
        "scored_tokens": sum(len(one.nll) for one in candidates),
        "races": [
            raced(problems, RaceRules(budget=budget, risk=risk), kind, costs)
            for budget in options.budgets
            for kind in ("table", "running means", "Bernstein")
            for risk in (RISKS if kind == "table" else FEW_RISKS)
        ],
        "sampled": [
            raced(problems, RaceRules(budget=budget, risk=risk, head_share=share), "table", costs)
            for budget in options.budgets
            for risk in FEW_RISKS
            for share in (None, *HEAD_SHARES)
        ],
        "head_flop_share": {name: cost.head / (cost.head + cost.body) for name, cost in costs.items()},
        "residual_correlation": correlation(problems),
    }
    write_json(options.out, made)
    print(json.dumps(made, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.racing", description=__doc__.partition("\n")[0])
    parser.add_argument("--scores", required=True, metavar="DIR", help="made with --per-token")
    parser.add_argument("--student", required=True, metavar="DIR", help="that made them")
    parser.add_argument("--pool", required=True, metavar="FILE", help="that they are of")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    parser.add_argument("--commit", required=True, metavar="SHA", help="of the code that runs")
    parser.add_argument("--max-length", type=int, default=4096, help="that they were made with")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 3])
    return parser.parse_args()


def _problems(options: argparse.Namespace) -> Iterator[tuple[str, list[Candidate]]]:
    """The scored candidates of each problem, with the token ids that they have been rendered to."""
    student = load_student(options.student, device="cpu", dtype="float32")
    renderer = Renderer(student.tokenizer, RenderOptions(max_length=options.max_length), vocab_size=student.vocab_size)
    tokens = {}
    for part in part_files(options.scores):
        columns = ["problem_id", "candidate_id", "token_nll", "token_brier"]
        for row in pq.read_table(part, columns=columns).to_pylist():
            tokens[row["problem_id"], row["candidate_id"]] = row["token_nll"], row["token_brier"]
    found: dict[str, list[Candidate]] = {}
    for raw in Pool((options.pool,)).read_raw():
        record = raw.parse()
        key = None if isinstance(record, Rejected) else (str(record.problem_id), str(record.candidate_id))
        if key in tokens:
            rendered = renderer(record)
            targets, ids = Targets.of(rendered.labels), np.asarray(rendered.input_ids)
            numbers = (np.asarray(values, dtype=np.float64) for values in tokens[key])
            digest = token_hash(ids, rendered.labels)
            one = Candidate(targets.words, ids[targets.rows], targets.rows, *numbers, digest)
            found.setdefault(key[0], []).append(one)
    yield from found.items()


def raced(
    problems: dict[str, list[Candidate]], rules: RaceRules, kind: str, costs: dict[str, ForwardCost]
) -> dict[str, Any]:
    """All races by these rules, beside the full scores."""
    forecasts = {"table": Forecaster, "running means": RunningMeans, "Bernstein": BernsteinForecaster}[kind]
    exact, made, name, missed, spent, audited = [], [], [], [], [], []
    flop: dict[str, list[tuple[float, float, float]]] = {of: [] for of in costs}
    for problem, own in problems.items():
        full = np.array([(one.nll.mean(), one.brier.mean()) for one in own])
        lengths = [len(one.nll) for one in own]
        whole = {of: cost.flop([int(one.rows[-1]) + 1 for one in own], sum(lengths)) for of, cost in costs.items()}
        exact += full.tolist()
        name += [problem] * len(own)
        if not rules.races(len(own)):
            made += full.tolist()
            spent.append([sum(lengths)] * 3)
            for of, each in whole.items():
                flop[of].append((each, each, each))
            audited.append(False)
            continue
        race = _race(own, rules, forecasts)
        outcome = replay(race, [one.nll for one in own], [one.brier for one in own])
        made += np.column_stack([outcome.nll, outcome.brier]).tolist()
        missed.append(missed_winners(g_hat(*full.T, np.zeros(len(own))), outcome.winner, np.zeros(len(own)))[0])
        spent.append([outcome.reached.sum(), outcome.known.sum(), sum(lengths)])
        for of, cost in costs.items():
            flop[of].append((*_flop(race, own, cost), whole[of]))
        audited.append(rules.audits(problem))
    apart = agreement(Scores(*np.array(exact).T), Scores(*np.array(made).T), name, rules.budget)
    used, read, total = np.array(spent, dtype=np.float64).T
    shares = {of: np.array(each).sum(axis=0) for of, each in flop.items()}
    low, high = proportion_interval(int(sum(missed)), len(missed))
    return {
        "budget": rules.budget,
        "risk": rules.risk,
        "forecasts": kind,
        "head_share": rules.head_share,
        "raced_problems": len(missed),
        "same_top": 1 - float(np.mean(missed)) if missed else None,
        "missed": int(sum(missed)),
        "missed_low": low,
        "missed_high": high,
        "token_share": float(used.sum() / total.sum()),
        "token_share_with_audit": float(np.where(audited, total, used).sum() / total.sum()),
        "read_share": float(read.sum() / total.sum()),
        "flop_share": {of: float(kept / whole) for of, (kept, _, whole) in shares.items()},
        "flop_share_without_past": {of: float(again / whole) for of, (_, again, whole) in shares.items()},
        "total_variation": apart.total_variation,
        "largest_total_variation": apart.largest_total_variation,
        "spearman_g_hat_within": apart.g_hat_within,
    }


def _race(own: list[Candidate], rules: RaceRules, forecasts: type[Forecaster]) -> "Watched":
    samples = draw_samples(rules, (len(one.rows) for one in own), (one.token_hash for one in own))
    words, before = [one.words for one in own], [one.before for one in own]
    return Watched(words, before, np.ones(len(own)), rules, forecasts, samples)


class Watched(Race):
    """A race that remembers what it has asked for."""

    def asks(self) -> list[NDArray[np.int64]] | None:
        """See ``Race``."""
        wanted = super().asks()
        if not hasattr(self, "rounds"):
            self.rounds = []
        if wanted is not None:
            self.rounds.append((self.reached.copy(), wanted))
        return wanted


def _flop(race: Watched, own: list[Candidate], cost: ForwardCost) -> tuple[float, float]:
    """Of all passes, with keys, values and hidden states kept, and with every piece from the first token again."""
    kept = again = 0.0
    for reached, wanted in race.rounds:
        for one, was, tokens in zip(own, reached.tolist(), wanted, strict=True):
            if not len(tokens):
                continue
            before, end = (int(one.rows[place - 1]) + 1 if place else 0 for place in (was, int(tokens[-1]) + 1))
            again += cost.flop([end], len(tokens))
            kept += cost.flop([], len(tokens))
            if end > before:
                kept += cost.flop([end], 0) - cost.flop([before], 0)
    return kept, again


def correlation(problems: dict[str, list[Candidate]]) -> dict[str, float]:
    """Of a token's residual, nll less what the table makes of it, with that of the token so many behind it.

    What a sample can spare hangs on it: neighbours that say the same need not all be read.
    """
    sums = dict.fromkeys((0, *LAGS), 0.0)
    for own in problems.values():
        words, before = [one.words for one in own], [one.before for one in own]
        made = Forecaster(words, before, np.ones(len(own)), RaceRules(budget=1))
        nll = np.concatenate([one.nll for one in own])
        apart = nll - made.table(nll, np.ones(len(nll), dtype=bool))
        for part in np.split(apart, np.cumsum(made.lengths)[:-1]):
            part = part - part.mean()
            for lag in sums:
                sums[lag] += float(part[: len(part) - lag] @ part[lag:])
    return {str(lag): sums[lag] / sums[0] for lag in LAGS}


if __name__ == "__main__":
    main()
