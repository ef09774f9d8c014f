"""Every kernel, compiled ahead of time for GPUs that need not be here: no spills, and the matrix units at work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arguments", [("sm_90",), ("sm_80", "--first"), ("sm_100", "--first"), ("gfx942", "--first")])
def test_kernels_fit_the_chip(arguments):
    reports = compiled("--arch", *arguments)
    operations = {report["operation"] for report in reports}
    assert operations == {"partial_sums", "label_logits", "finish", "logits_sums", "brier_topk", "trajectory_reduce"}
    for report in reports:
        assert report["spilled_bytes"] == 0, report
        assert report["shared_least"] <= report["shared_bytes"] <= report["shared_limit"], report
        assert report["matrix_instructions"] or not report["multiplies"], report
