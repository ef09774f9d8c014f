"""``python -m benchmarks.record --out FILE.json --commit SHA``: what the kernels do on this machine, as one object.

First every implementation on fresh operands against float64 (correctness.py): what is wrong has no time, and the exit
status is 1. Then ours, the limit and the peers in turn, with raw samples. The file is renewed after every step, and a
line says what comes next, so a run that is cut short leaves what it had and where it was.

``--only NAME`` (may be repeated) keeps what has NAME in its name, ``--tiny`` takes sizes that prove the path and
measure nothing, ``--fingerprint`` prints the kernels' fingerprints, ``--tune`` times the candidates of dispatch.py.
"""

import argparse
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in conftest.py
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned outputs ask cuBLAS to be deterministic

import torch

from benchmarks import baselines, chi2, correctness, fp8_rows, head, loss, passes, timing, training, trajectories
from benchmarks.comparison import DEVICE, Workload, missing_peers, note_missing
from benchmarks.fingerprint import fingerprints

SECONDS = 5.0  # of the rounds of one workload
PACKAGES = ("triton", "liger_kernel", "cut_cross_entropy")
Step = tuple[str, Callable[[], Workload]]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 where something is wrong."""
    options = _options(arguments)
    if options.fingerprint:
        print(json.dumps(fingerprints(), indent=2))
        return 0
    if options.tune:
        from benchmarks.tune import tune

        return tune(options.tiny)
    warnings.filterwarnings("ignore", message=".*deterministic")
    record = _machine(options.commit)
    wrong = _correctness(record, options)
    torch.cuda.empty_cache()
    for name, build in _steps(options.tiny):
        if _kept(name, options.only):
            torch.compiler.reset()  # it gives up on a function that it has compiled for eight shapes
            if problem := _problem(lambda make=build: _time(record, make(), wrong, options.tiny)):
                record["stopped"].append({"name": name, "problem": problem})
                print(f"{name}: {problem}", file=sys.stderr, flush=True)
            record["missing_peers"] = list(missing_peers)
            _write(options.out, record)
            torch.cuda.empty_cache()
    if problem := _problem(lambda: record.update(kernels=timing.compiled_kernels())):
        record["stopped"].append({"name": "registers of kernels", "problem": problem})
    _write(options.out, record)
    for name in sorted(wrong):
        print(f"wrong, so not timed: {name}", file=sys.stderr)
    return 1 if wrong or record["stopped"] else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--commit", metavar="SHA", help="of this checkout, which may have come without .git")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="what has NAME in its name")
    parser.add_argument("--tiny", action="store_true", help="sizes that prove the path and measure nothing")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="of the operands; fresh by default")
    parser.add_argument("--fingerprint", action="store_true", help="print the kernels' fingerprints and stop")
    parser.add_argument("--tune", action="store_true", help="time the candidates of kernels/dispatch.py and stop")
    options = parser.parse_args(arguments)
    if not (options.fingerprint or options.tune or (options.out and options.commit)):
        parser.error("--out and --commit are needed")
    return options


def _machine(commit: str) -> dict:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": baselines.device_name(),
        "driver": _driver(),
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "kernels_sha256": fingerprints(),
        "correctness": [],
        "results": [],
        "kernels": [],
        "missing_peers": [],
        "stopped": [],  # what ended before its time, and how
    }


def _driver() -> str | None:
    """Of the GPU; None without one, or where nobody tells."""
    if DEVICE.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found else None


def _correctness(record: dict, options: argparse.Namespace) -> set[str]:
    """Fill in ``correctness``; the names of what is wrong, "workload/implementation"."""
    record["seed"] = options.seed
    wrong = set()

    def check_all() -> None:
        for case in correctness.cases(options.seed, options.tiny):
            if _kept(case.name, options.only):
                _tell(f"check {case.name}, {case.shape} {case.dtype}, {case.operands}")
                entries = correctness.check(case)
                record["correctness"] += entries
                if not all(entry["ok"] for entry in entries):
                    wrong.add(case.name)
                _write(options.out, record)

    if problem := _problem(check_all):  # operands could not be made: what is not checked is not timed
        record["stopped"].append({"name": "correctness", "problem": problem})
        _write(options.out, record)
        print(f"correctness: {problem}", file=sys.stderr, flush=True)
        raise SystemExit(1)
    _write(options.out, record)
    return wrong


def _steps(tiny: bool) -> Iterator[Step]:
    """Workloads to time, each made when its turn comes."""
    shapes, logits_shapes, n = head.SHAPES, head.LOGITS_SHAPES, trajectories.TRAJECTORIES
    loss_shapes = loss.SHAPES
    if tiny:
        shapes, logits_shapes, n = [(33, 48, 257, torch.float32)], [(33, 257, torch.float32)], 50
        loss_shapes = shapes
    for shape in shapes:
        yield head.ALL, partial(head.head, *shape)
    shapes = shapes if DEVICE.type == "cuda" else shapes[:2]  # one of each dtype has to do on a CPU
    for shape in shapes:
        yield head.LIGHT, partial(head.head, *shape, statistics=head.NLL_BRIER)
    for shape in shapes:
        yield head.TOPK, partial(head.head, *shape, top_k=head.TOP_K)
    for shape in shapes:
        yield head.ROWS, partial(head.scored_rows, *shape)
    for shape in logits_shapes:
        yield head.FROM_LOGITS, partial(head.from_logits, *shape)
    for shape in loss_shapes:
        yield loss.NAME, partial(loss.workload, *shape)
    yield trajectories.NAME, partial(trajectories.reduction, n)
    for rows in [(33, 48)] if tiny else fp8_rows.SHAPES:
        yield fp8_rows.NAME, partial(fp8_rows.rounding, *rows)
    for dtype in chi2.DTYPES:
        for ragged in (False, True):
            yield chi2.NAME, partial(chi2.solving, 400 if tiny else chi2.N, dtype, ragged)
    for case in [passes.TINY] if tiny else passes.PASSES:
        yield passes.NAME, case.build
    for case in [training.TINY] if tiny else training.CASES:
        yield training.NAME, case.build


@torch.no_grad()
def _time(record: dict, workload: Workload, wrong: set[str], tiny: bool) -> None:
    """Add to ``results`` one entry for every implementation that is right; peers and limit are the same for all."""
    about = {"shape": workload.shape, "dtype": str(workload.dtype).removeprefix("torch.")}
    ours = {f"{workload.name}/{impl}": partial(workload.ours, impl) for impl in workload.implementations}
    for name in ours.keys() - wrong:
        if problem := _problem(lambda run=ours[name]: workload.check(run())):
            wrong.add(name)
            entry = {"name": name, **about, "error": None, "budget": None, "ok": False, "problem": problem}
            record["correctness"].append(entry)
    ours = {name: run for name, run in ours.items() if name not in wrong}
    peers = dict(workload.peers)
    for peer, run in workload.peers.items():
        if problem := _problem(run):
            del peers[peer]
            note_missing(f"{peer}: {problem}")
    if not ours:
        return
    _tell(f"time {workload.name}, {workload.shape} {about['dtype']}")
    samples = timing.take_turns({**ours, "limit": workload.limit, **peers}, 0.0 if tiny else SECONDS)
    medians = {name: median(own) for name, own in samples.items()}
    limit_ms = medians["limit"] * workload.limit_scale
    memory = {name: (timing.extra_memory_mib(run), timing.peak_memory_mib()) for name, run in {**ours, **peers}.items()}
    peers_memory = {peer: memory[peer][0] for peer in peers}
    for name in ours:
        record["results"].append(
            {
                "name": name,
                **about,
                "median_ms": medians[name],
                "samples_ms": samples[name],
                "limit_ms": limit_ms,
                "limit_samples_ms": [milliseconds * workload.limit_scale for milliseconds in samples["limit"]],
                "ratio_to_limit": medians[name] / limit_ms,
                "peers": {peer: medians[peer] for peer in peers},
                "extra_memory_mib": memory[name][0],
                "peers_extra_memory_mib": peers_memory,
                **(_by_token(workload.tokens, name, peers, medians, limit_ms, memory) if workload.tokens else {}),
            }
        )


def _by_token(tokens: int, name: str, peers: dict, medians: dict, limit_ms: float, memory: dict) -> dict:
    """Of a workload that is told in tokens: their speed, the share of the ceiling, and what the GPU held in all."""

    def of(run: str) -> dict:
        milliseconds = medians[run]
        return {
            "tokens_per_s": tokens / milliseconds * 1e3,
            "ceiling_share": limit_ms / milliseconds,
            "peak_memory_mib": memory[run][1],
        }

    return {**of(name), "peers_by_token": {peer: of(peer) for peer in peers}}


def _problem(run: Callable[[], object]) -> str | None:
    """What a run fails with, whatever it is: the record goes on, and says it."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:1000]
    return None


def _tell(line: str) -> None:
    """Where a run is, said before it goes there: whatever hangs or kills it is the last line."""
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", flush=True)


def _kept(name: str, only: list[str]) -> bool:
    return not only or any(part in name for part in only)


def _write(out: Path, record: dict) -> None:
    """The file appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")
    draft.replace(out)


def _finite(value: object) -> object:
    """The same with null for every number that JSON does not know; such an error is over any budget."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
