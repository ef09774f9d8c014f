"""``python -m benchmarks.policies --student DIR --pool FILE --out DIR``: what a selection is worth, at equal tokens.

The student is trained on what each policy selects of a pool, several seeds each, all for the same number of input
tokens, at the same rate and in batches of the same size. What is compared is the loss on problems that nobody trains
on: the mean over held-out trajectories of their mean nll a token. The same command goes on where it was stopped.

chi2: LARK's selection with its weights. topb: the same candidates, alike. random: as many of each problem, alike, drawn
anew with each seed. full: every trajectory of the pool, alike.
"""

import argparse
import hashlib
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks import baselines
from benchmarks.policies_report import BASELINE, COLOURS, draw, report, summaries
from lark_fast.errors import UserError
from lark_fast.files import write_json
from lark_fast.pool.reading import Pool
from lark_fast.pool.records import Record
from lark_fast.rendering.renderer import Renderer, RenderOptions
from lark_fast.scoring.run import ScoreConfig, score_pool
from lark_fast.selection.run import SelectConfig, select
from lark_fast.student import load_student
from lark_fast.training.batches import global_batch, steps_per_epoch
from lark_fast.training.config import TrainConfig
from lark_fast.training.data import TrainingSet, load_training_set
from lark_fast.training.run import train


@dataclass
class Selection:
    """What one policy trains on."""

    path: Path
    data: TrainingSet
    facts: dict[str, Any]


def main() -> None:
    """Run what is missing, then print the tables and write policies.json and policies.png."""
    options = _options()
    try:
        result = compare(options)
    except UserError as error:
        print(f"policies: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    write_json(options.out / "policies.json", result)
    text = report(result)
    (options.out / "policies.md").write_text(text, encoding="utf-8")
    print(text)
    draw(result, options.out / "policies.png")


def _options() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policies", description=__doc__.partition("\n\n")[2], formatter_class=formatter
    )
    parser.add_argument("--student", required=True, metavar="DIR")
    parser.add_argument("--pool", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--policies", nargs="+", default=list(COLOURS), choices=list(COLOURS))
    parser.add_argument("--seeds", type=int, default=3, help="so many, from --first-seed on; of draws and of orders")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=250_000, help="input tokens of a run, to half a step")
    parser.add_argument("--lr", type=float, default=3e-4, help="the same for every policy")
    parser.add_argument("--global-batch", type=int, default=32)
    parser.add_argument("--evaluations", type=int, default=4, help="held-out losses after the one at the start")
    parser.add_argument("--held-out-from", type=int, metavar="ID", help="hold out problems numbered so or higher")
    parser.add_argument("--held-out-share", type=float, default=0.2, help="else this share of the problems, by hash")
    parser.add_argument("--held-out", type=int, default=150, help="trajectories of these problems to measure, at most")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, and what they say."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    pool, held_out, split = _split(options)
    scores, student = str(out / "scores"), options.student
    score_pool(ScoreConfig(pool=(str(pool),), student=student, out=scores, dtype="float32"))
    loaded = load_student(student, dtype="float32")
    settings = RenderOptions().fitting(loaded.max_positions)
    renderer = Renderer(loaded.tokenizer, settings, vocab_size=loaded.vocab_size)
    of_policy = partial(_selection, options, pool, scores, renderer)
    runs, selections = [], {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for policy in options.policies:
            selection = of_policy(policy, seed)
            selections.setdefault(policy, selection.facts)  # of random, the first seed's draw
            runs.append(_run(options, selection, policy, seed, held_out))
            _say(runs[-1])
    names = ("budget", "tokens", "lr", "global_batch", "dtype", "held_out_from", "held_out_share", "policies")
    return {
        "device": baselines.device_name(),
        "versions": baselines.versions(),
        "student": Path(student).name,
        "pool": Path(options.pool).name,
        **{name: getattr(options, name) for name in names},
        "split": split,
        "selections": selections,
        "policy": summaries(runs, _teachers(held_out)),
        "runs": [{name: value for name, value in run.items() if name != "nll"} for run in runs],
    }


def _split(options: argparse.Namespace) -> tuple[Path, Path, dict[str, Any]]:
    """Write pool.jsonl and held-out.jsonl; no problem has answers in both."""
    kept, unseen = [], []
    for record in Pool([options.pool]).read():
        if isinstance(record, Record):
            (unseen if _is_held_out(record, options) else kept).append(record)
    judged = any("correct" in record.extra for record in unseen)
    fit = [record for record in unseen if record.extra.get("correct") or not judged]
    if not kept or not fit:
        raise UserError(f"{options.pool}: {len(kept)} trajectories to train on and {len(fit)} fit to be held out")
    chosen = sorted(random.Random(0).sample(range(len(fit)), min(options.held_out, len(fit))))
    held_out = [fit[index] for index in chosen]
    paths = options.out / "pool.jsonl", options.out / "held-out.jsonl"
    for path, records in zip(paths, (kept, held_out), strict=True):
        _write(path, records)
    split = {
        "pool_problems": len({record.key[0] for record in kept}),
        "pool_trajectories": len(kept),
        "held_out_problems": len({record.key[0] for record in held_out}),
        "held_out_trajectories": len(held_out),
        "held_out_are": "correct answers only" if judged else "all answers",
        "held_out_teachers": dict(sorted(Counter(record.teacher for record in held_out).items())),
    }
    return *paths, split


def _is_held_out(record: Record, options: argparse.Namespace) -> bool:
    problem = record.key[0]
    if options.held_out_from is None:
        number = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8], "big")
        return number < options.held_out_share * 2**64
    if not problem.isdecimal():
        raise UserError(f"{record.source}:{record.line}: problem {problem!r} has no number; give --held-out-share")
    return int(problem) >= options.held_out_from


def _write(path: Path, records: Iterable[Record]) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        for record in records:
            text = {"messages": record.messages, "input_ids": record.input_ids, "labels": record.labels}
            names = {"problem_id": record.problem_id, "candidate_id": record.candidate_id, "teacher": record.teacher}
            judged = {name: record.extra[name] for name in ("correct",) if name in record.extra}
            line = names | {name: value for name, value in text.items() if value is not None} | judged
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _selection(
    options: argparse.Namespace, pool: Path, scores: str, renderer: Renderer, policy: str, seed: int
) -> Selection:
    path, size = pool, None
    if policy != "full":
        # Made anew each time: it takes a second, and training notices when it is not what it was.
        folder = options.out / f"selection-{policy}{f'-{seed}' if policy == BASELINE else ''}"
        common = {"policy": policy, "budget": options.budget, "seed": seed, "overwrite": True}
        summary = select(SelectConfig(scores=scores, pool=(str(pool),), out=str(folder), **common))
        path, size = folder / "train.jsonl", summary.mean_effective_sample_size
    data = load_training_set(str(path), renderer)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    shares: dict[str, float] = defaultdict(float)
    for row in rows:
        shares[row.get("meta", row)["teacher"]] += row.get("weight", 1) / data.weights.sum()
    facts = {
        "rows": len(data),
        "input_tokens": len(data.ids),
        "input_tokens_a_row": round(float(data.lengths.mean()), 1),
        "scored_tokens_a_row": round(float(data.n_scored.mean()), 1),
        "effective_candidates_a_problem": None if size is None else round(size, 3),
        "teachers_by_weight": {name: round(float(share), 4) for name, share in sorted(shares.items())},
    }
    if all("correct" in row for row in rows):
        right = sum(row.get("weight", 1) for row in rows if row["correct"]) / data.weights.sum()
        facts["correct_by_weight"] = round(float(right), 4)
    return Selection(path, data, facts)


def _steps(data: TrainingSet, options: argparse.Namespace, seed: int) -> int:
    """How many steps come nearest to the tokens asked for; at least one."""
    tokens = steps = 0
    while True:
        batch = global_batch(steps, len(data), options.global_batch, seed)
        more = int(data.lengths[batch].sum())
        if steps and tokens + more / 2 > options.tokens:
            return steps
        tokens, steps = tokens + more, steps + 1


def _run(options: argparse.Namespace, selection: Selection, policy: str, seed: int, held_out: Path) -> dict[str, Any]:
    """Train, unless this very run is complete, and read what it left."""
    data, batch, folder = selection.data, options.global_batch, options.out / f"run-{policy}-{seed}"
    steps = _steps(data, options, seed)
    summary = train(
        TrainConfig(
            data=str(selection.path),
            student=options.student,
            out=str(folder),
            eval_data=str(held_out),
            eval_every=-(-steps // options.evaluations),
            probe=str(held_out),  # every held-out trajectory's own nll, for the teachers and the bootstrap
            epochs=-(-steps // steps_per_epoch(len(data), batch)),
            max_steps=steps,
            lr=options.lr,
            global_batch=batch,
            dtype=options.dtype,
            seed=seed,
            save_every=20,
        )
    )
    tokens, curve = 0, []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        logged = json.loads(line)
        tokens += logged.get("tokens", 0)
        if "eval_loss" in logged:
            curve.append([tokens, round(logged["eval_loss"], 6)])
    return {
        "policy": policy,
        "seed": seed,
        "steps": summary.steps,
        "tokens": tokens,
        "epochs": round(steps * batch / len(data), 3),
        "held_out_loss": curve,
        "tokens_per_second": round(summary.tokens_per_second, 1),
        "nll": pq.read_table(folder / "probe.parquet").column("nll_after").to_numpy(),
    }


def _say(run: dict[str, Any]) -> None:
    first, last = run["held_out_loss"][0][1], run["held_out_loss"][-1][1]
    speed = f"{run['tokens_per_second']:,.0f} tokens/s"
    print(
        f"{run['policy']}, seed {run['seed']}: {run['steps']} steps, {run['tokens']:,} tokens, {speed}, "
        f"held-out loss {first:.4f} -> {last:.4f}",
        flush=True,
    )


def _teachers(held_out: Path) -> list[tuple[str, str]]:
    """Problem and teacher of every held-out trajectory."""
    rows = map(json.loads, held_out.read_text(encoding="utf-8").splitlines())
    return [(str(row["problem_id"]), row["teacher"]) for row in rows]


if __name__ == "__main__":
    main()
