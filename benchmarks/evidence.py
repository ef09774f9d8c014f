"""``python -m benchmarks.evidence --student DIR --pool FILE --out DIR``: does the score predict what training does?

Runs ``lark-fast diagnose``, ``score``, ``select`` and ``pilot`` one after the other as a user would, each going on
where it was stopped, and writes what they left into one file, evidence.json. Committed unedited as
``benchmarks/results/<device>/evidence-<date>-<pool>.json`` it is what ``benchmarks.documents`` writes docs/ from.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import baselines
from benchmarks.fingerprint import fingerprints
from lark_fast.files import write_json

RECORD, SECONDS = "evidence.json", "seconds.json"
RESULTS = {
    "diagnose": "diagnosis/summary.json",
    "score": "scores/manifest.json",
    "select": "selection/manifest.json",
    "pilot": "pilot/pilot.json",
}
SELECTION = ("counts", "mean_effective_sample_size", "mean_chi2_divergence", "selected_tokens", "teachers")


def main() -> None:
    """Run what is missing and write the record."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / SECONDS
    seconds = json.loads(path.read_text()) if path.exists() else {}
    for name, words in _commands(options).items():
        repeated, started = _is_done(options.out / RESULTS[name]), time.monotonic()
        subprocess.run([sys.executable, "-m", "lark_fast", *words], check=True)
        if repeated:  # to measure anew what was done, which is not what it takes
            continue
        # Of a command that was stopped and went on, all its parts.
        seconds[name] = round(seconds.get(name, 0) + time.monotonic() - started, 1)
        path.write_text(json.dumps(seconds))
    write_json(options.out / RECORD, _record(options, seconds))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.partition("\n")[0])
    parser.add_argument("--student", required=True, metavar="DIR")
    parser.add_argument("--pool", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--commit", required=True, metavar="SHA", help="of the code that runs")
    parser.add_argument("--budget", type=int, default=3)
    parser.add_argument("--diagnose", default="", metavar="OPTIONS", help="further options, in one word")
    parser.add_argument("--pilot", default="", metavar="OPTIONS", help="the same; 'no' leaves all but diagnose out")
    return parser.parse_args()


def _commands(options: argparse.Namespace) -> dict[str, list[str]]:
    out, budget = options.out, ["--budget", str(options.budget)]
    common = ["--pool", options.pool, "--student", options.student]
    scores = ["--scores", str(out / "scores"), "--pool", options.pool, "--out", str(out / "selection"), "--overwrite"]
    commands = {"diagnose": ["diagnose", *common, *budget, "--out", str(out / "diagnosis")]}
    commands["diagnose"] += shlex.split(options.diagnose)
    if options.pilot != "no":
        commands["score"] = ["score", *common, "--out", str(out / "scores"), "--dtype", "float32"]
        commands["select"] = ["select", *scores, *budget]
        pilot = [*common, *budget, "--out", str(out / "pilot")]
        commands["pilot"] = ["pilot", *pilot, *shlex.split(options.pilot)]
    return commands


def _record(options: argparse.Namespace, seconds: dict[str, float]) -> dict[str, Any]:
    left = {"diagnosis": "diagnose", "selection": "select", "pilot": "pilot"}
    found = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, command in left.items()
        if (path := options.out / RESULTS[command]).exists()
    }
    if "selection" in found:  # the rest says where things lie on this machine
        found["selection"] = {name: found["selection"][name] for name in SELECTION} | {"budget": options.budget}
    for name in ("not_finite", "outliers"):
        found["diagnosis"][name] = [Path(place).name for place in found["diagnosis"][name]]
    return {
        "device": baselines.device_name(),
        "versions": baselines.versions(),
        "date": date.today().isoformat(),
        "commit": options.commit,
        "kernels_sha256": fingerprints(),
        "commands": {name: " ".join(_without_places(words)) for name, words in _commands(options).items()},
        "seconds": seconds,
        **found,
    }


def _is_done(result: Path) -> bool:
    return result.exists() and json.loads(result.read_text(encoding="utf-8")).get("complete", True)


def _without_places(words: list[str]) -> list[str]:
    """As one would type it: names of files, not where they lie on this machine."""
    return [Path(word).name if "/" in word else word for word in ["lark-fast", *words]]


if __name__ == "__main__":
    main()
