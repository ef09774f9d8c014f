"""``python -m benchmarks.end_to_end --student DIR --pool FILE``: from a file to scores on disk, beside the peers.

Each way is a process of its own over the same first records, in turn, and its best round counts; loading the student is
left out. The peers: LARK's released script, where ``--reference`` names a checkout of it (timed over many records less
one), and a loop over padded batches with Transformers. ``--out`` keeps every round as JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import baselines

TOP_K = 50
Run = Callable[[], dict[str, Any]]


def main() -> None:
    """Print a table, a line a way."""
    options = _options()
    if options.peer:
        print(json.dumps(_padded_batches(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        pool, one = (_write_pool(options, Path(folder) / f"{n}.jsonl", n) for n in (options.limit, 1))
        ways: dict[str, Run] = {"lark-fast": partial(_ours, options, pool, Path(folder))}
        if options.compile:
            ways["lark-fast --compile"] = partial(_ours, options, pool, Path(folder), "--compile")
        ways["padded batches"] = partial(_peer, options, pool)
        if options.reference:
            ways["reference script"] = partial(_reference, options, pool, one, Path(folder))
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, run in ways.items():
                rounds[name].append(run())
                print(f"{name}: {rounds[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    _report(options, rounds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.partition("\n")[0])
    parser.add_argument("--student", required=True, metavar="DIR")
    parser.add_argument("--pool", required=True, metavar="FILE")
    parser.add_argument("--limit", type=int, default=300, help="how many records")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also with compiled layers")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of LARK's released code")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)  # this process is the peer
    return parser.parse_args()


def _write_pool(options: argparse.Namespace, path: Path, n: int) -> Path:
    """The first n records as plain JSONL, which every way reads."""
    from lark_fast.pool.reading import Pool
    from lark_fast.pool.records import Record

    with open(path, "w", encoding="utf-8") as stream:
        for item in Pool([options.pool]).read(n):
            if isinstance(item, Record):
                names = {"problem_id": item.problem_id, "candidate_id": item.candidate_id, "teacher": item.teacher}
                stream.write(json.dumps(names | {"messages": list(item.messages)}) + "\n")
    return path


def _ours(options: argparse.Namespace, pool: Path, folder: Path, *more: str) -> dict[str, Any]:
    arguments = ["--student", options.student, "--dtype", options.dtype, "--top-k", str(TOP_K)]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = ["lark_fast", "score", "--pool", str(pool), "--out", out, "--json", *arguments, *more]
        summary = json.loads(_python(*command))
    return summary | {"seconds": summary["seconds"] + summary["finish_seconds"]}


def _peer(options: argparse.Namespace, pool: Path) -> dict[str, Any]:
    arguments = ["--student", options.student, "--pool", str(pool), "--dtype", options.dtype]
    return json.loads(_python("benchmarks.end_to_end", "--peer", *arguments))


def _reference(options: argparse.Namespace, pool: Path, one: Path, folder: Path) -> dict[str, Any]:
    seconds = []
    for records in (one, pool):
        started = time.perf_counter()
        arguments = ["--input", str(records), "--output", str(folder / "scores.json"), "--dtype", options.dtype]
        student = str(Path(options.student).resolve())
        _python("lark.score_lark", *arguments, "--student_model", student, cwd=options.reference)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[1] - seconds[0]}


def _python(*arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def _padded_batches(options: argparse.Namespace) -> dict[str, Any]:
    """Read, render, tokenise and score in batches in the order of the pool, and write the scores as JSON."""
    from benchmarks.passes import padded_batches
    from lark_fast.pool.reading import Pool
    from lark_fast.scoring.scorer import Scorer
    from lark_fast.student import load_student

    scorer = Scorer(load_student(options.student, dtype=options.dtype))
    started = time.perf_counter()
    rendered = [scorer.renderer(record) for record in Pool([options.pool]).read()]
    scores = padded_batches(scorer.student.model, rendered)
    with tempfile.TemporaryFile("w") as stream:
        json.dump(scores, stream)
    return {"seconds": time.perf_counter() - started}


def _report(options: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]]) -> None:
    best = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in rounds.items()}
    ours = best["lark-fast"]
    ceiling = max(run["matmul_flop_per_second"] for run in rounds["lark-fast"])
    print(f"{options.limit} records, {ours['input_tokens']:,} tokens, {options.dtype}; {baselines.device_name()}")
    for name, run in best.items():
        share = ours["forward_flop"] / run["seconds"] / ceiling
        tokens = ours["input_tokens"] / run["seconds"]
        times = run["seconds"] / ours["seconds"]
        print(f"{name:20} {tokens:9,.0f} tokens/s  {share:4.0%} of the matmul ceiling  {times:5.2f}x lark-fast's time")
    shares = {name: ours[name] for name in ("device_busy_share", "writing_share", "padding_share")}
    print(", ".join(f"{name.removesuffix('_share').replace('_', ' ')} {value:.1%}" for name, value in shares.items()))
    print(f"tokenising {ours['rendered_tokens_per_second']:,.0f} tokens/s a process")
    if options.out:
        about = {"device": baselines.device_name(), "versions": baselines.versions()}
        names = ("student", "pool", "limit", "dtype", "compile", "reference")
        about |= {name: Path(str(getattr(options, name))).name for name in names}
        options.out.write_text(json.dumps(about | {"rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
