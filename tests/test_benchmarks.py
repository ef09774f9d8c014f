"""The benchmarks' own rules: what is judged and how, what a record holds, and that a wrong result has no time."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks import accuracy, baselines, correctness, record
from benchmarks.fingerprint import fingerprint, fingerprints
from lark_fast.kernels.softmax_sums import TokenStats
from lark_fast.kernels.token_stats import token_stats, token_stats_naive

ROOT = Path(__file__).parent.parent
NAME = "copy; N=1000; float32"
TINY_BENCHMARK = """
import torch
from benchmarks.comparison import compare

def test_copy(benchmark):
    run = torch.ones(1000).clone
    compare(benchmark, "copy", run, limit=run, peers={}, check=lambda _: None, shape="N=1000", dtype="float32")
"""


def python(*arguments):
    # Without Triton's interpreter, which is right and slow: the kernels' own tests are the place for it.
    # And without what tells pytest-benchmark that it is one worker among others, and so not to time.
    mine = ("TRITON_INTERPRET", "PYTEST_XDIST")
    env = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("device", "allowed"), [("cuda", 0.15), ("cpu", 0.30)])
def test_a_ratio_is_judged_by_how_much_worse_it_is(device, allowed):
    assert baselines.complaint(1.2, 1.2, device) is None
    assert baselines.complaint(0.5, 1.2, device) is None
    assert baselines.complaint(1.2 * (1 + allowed - 0.01), 1.2, device) is None
    worse = baselines.complaint(1.2 * (1 + allowed + 0.01), 1.2, device)
    assert f"{allowed + 0.01:.0%} worse than the baseline 1.200x; {allowed:.0%} is allowed" in worse


def test_baselines_are_kept_by_versions_and_benchmark(tmp_path, monkeypatch):
    baselines.save(tmp_path, {"a": 1.0, "b": 2.0})
    baselines.save(tmp_path, {"b": 3.0})
    assert baselines.load(tmp_path) == {"a": 1.0, "b": 3.0}
    monkeypatch.setattr(baselines, "versions", lambda: "torch of tomorrow")
    assert baselines.load(tmp_path) == {}
    baselines.save(tmp_path, {"a": 9.0})
    monkeypatch.undo()
    assert baselines.load(tmp_path) == {"a": 1.0, "b": 3.0}


def test_a_benchmark_run_judges_against_its_baselines(tmp_path):
    test = tmp_path / "test_tiny.py"
    test.write_text(TINY_BENCHMARK)
    folder = tmp_path / "baselines"

    def run(*options):
        common = ("-p", "benchmarks.conftest", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml")
        return python("pytest", test, *common, "--baselines", folder, *options)

    unjudged = run()
    assert unjudged.returncode == 0, unjudged.stdout + unjudged.stderr
    assert "no baseline for this device and these versions, so not judged: 1 of 1" in unjudged.stdout

    assert run("--save-baselines").returncode == 0
    path = baselines.path_for(folder)
    known = json.loads(path.read_text())
    assert list(known) == [baselines.versions()]
    assert known[baselines.versions()].keys() == {NAME}

    for factor, status in ((1e3, 0), (1e-3, 1)):  # far from any noise: as if it had been worse, or better, before
        path.write_text(json.dumps({baselines.versions(): {NAME: known[baselines.versions()][NAME] * factor}}))
        judged = run()
        assert judged.returncode == status, judged.stdout
        assert "not judged" not in judged.stdout
        assert (f"{NAME}: " in judged.stdout and "worse than" in judged.stdout) == bool(status)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("record") / "deeper" / "record.json"
    run = python("benchmarks.record", "--out", out, "--commit", "abc123", "--tiny", "--only", "head, nll and brier")
    assert run.returncode == 0, run.stderr
    return json.loads(out.read_text())


def test_a_record_has_every_field(recorded):
    assert recorded.keys() >= {"device", "driver", "versions", "date", "commit", "kernels_sha256", "seed", "kernels"}
    assert recorded["commit"] == "abc123"
    assert recorded["versions"]["torch"] == torch.__version__
    assert recorded["kernels_sha256"] == fingerprints()
    for entry in recorded["correctness"]:
        assert entry.keys() >= {"name", "shape", "dtype", "error", "budget", "ok"}
        assert entry["ok"]
        assert entry["error"] <= entry["budget"]
    assert {entry["dtype"] for entry in recorded["correctness"]} == {"float32", "bfloat16", "float16"}
    assert {entry["operands"] for entry in recorded["correctness"]} == {"peaky", "flat", "broken", "transformed"}
    assert any(entry["confident_error"] is not None for entry in recorded["correctness"])
    [*_, result] = recorded["results"]
    assert result.keys() >= {"name", "shape", "dtype", "extra_memory_mib"}
    assert median(result["samples_ms"]) == result["median_ms"]
    assert result["ratio_to_limit"] == pytest.approx(result["median_ms"] / result["limit_ms"])
    assert "eager (nll, brier)" in result["peers"]


def test_a_training_step_is_recorded_beside_its_peers(tmp_path):
    out = tmp_path / "record.json"
    assert record.main(["--out", str(out), "--commit", "abc123", "--tiny", "--only", "training step"]) == 0
    written = json.loads(out.read_text())
    wanted = {"plain loop"} | ({"TRL, packed", "TRL, padded"} if find_spec("trl") else set())
    assert {result["name"] for result in written["results"]} == {"training step/packed", "training step/padded"}
    for result in written["results"]:
        assert result["peers"].keys() == result["peers_by_token"].keys() == wanted
        assert result["ceiling_share"] == pytest.approx(1 / result["ratio_to_limit"])
        assert result["tokens_per_s"] > 0
        assert result["peak_memory_mib"] is None


def test_what_is_wrong_is_told_and_not_timed(tmp_path, monkeypatch):
    def slightly_wrong(*arguments, **options):
        return token_stats(*arguments, **options).map(lambda x: x * (1 + 1e-3) if x.is_floating_point() else x)

    monkeypatch.setattr(correctness, "token_stats", slightly_wrong)
    out = tmp_path / "record.json"
    arguments = ["--out", str(out), "--commit", "abc123", "--tiny", "--only", "head, nll and brier"]
    assert record.main(arguments) == 1
    written = json.loads(out.read_text())
    assert not all(entry["ok"] for entry in written["correctness"])
    assert not written["results"]


def test_what_raises_is_wrong(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(correctness, "token_stats", fails)
    [entry] = correctness.check(next(correctness.cases(0, tiny=True)))
    assert not entry["ok"]
    assert entry["problem"] == "RuntimeError: out of registers"


def test_errors_are_judged_beside_the_budget_of_eager_torch():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 32, generator=g).bfloat16(), torch.randn(300, 32, generator=g).bfloat16()
    labels = torch.randint(0, 300, (40,), generator=g)
    labels[:20] = (hidden[:20] @ weight.T).argmax(1)
    labels[7] = -100
    truth = token_stats_naive(hidden, weight, labels)
    others = hidden @ weight.T, labels, torch.bfloat16

    def wrong(stats: TokenStats) -> set[str]:
        return {entry["statistic"] for entry in accuracy.judge(stats, truth, *others) if not entry["ok"]}

    assert wrong(token_stats(hidden, weight, labels)) == set()
    eager = accuracy.eager_stats(others[0], labels.clamp(min=0), None)
    assert {"nll", "brier", "entropy"} <= wrong(eager)  # also a number on a row that was to be left out
    whole = labels != -100
    rounded = TokenStats(*(x.where(whole, truth_x) for x, truth_x in zip(fields(eager), fields(truth), strict=True)))
    assert {"nll", "brier", "entropy"} <= wrong(rounded)


def fields(stats):
    return stats.nll, stats.brier, stats.entropy, stats.rank, stats.agreement


def test_a_fingerprint_is_of_the_code_alone():
    code = 'def f(x):\n    """Doc."""\n    return x + 1\n'
    assert fingerprint(code) == fingerprint('"""Module."""\n\n\ndef f(x):  # why\n    return x + 1\n')
    assert fingerprint(code) != fingerprint(code.replace("+ 1", "+ 2"))
    assert fingerprint(code) != fingerprint(code.replace("f(x)", "f(x, y=0)"))
    printed = python("benchmarks.record", "--fingerprint")
    assert json.loads(printed.stdout) == fingerprints()
    assert set(fingerprints()) == {path.name for path in (ROOT / "kernels").glob("*.py")}
