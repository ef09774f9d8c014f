"""Every kernel, compiled ahead of time for GPUs that need not be here: no spills, and the matrix units at work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.aot import faults

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("arguments", [("sm_90",), ("sm_80", "--first"), ("sm_100", "--first"), ("gfx942", "--first")])
def test_kernels_fit_the_chip(arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--arch", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report for report in reports if report["faults"]] == [], done.stderr
    assert done.returncode == 0, done.stderr
    operations = {report["operation"] for report in reports}
    head = {"partial_sums", "label_logits", "finish", "logits_sums", "brier_topk", "trajectory_reduce", "quantise_rows"}
    assert operations == head | {"loss_errors", "loss_errors_of_logits", "chi2_solve"}


def test_faults_are_found():
    fine = {
        "spilled_bytes": 0,
        "shared_bytes": 9,
        "shared_least": 9,
        "shared_limit": 9,
        "multiplies": True,
        "matrix_instructions": True,
    }
    assert faults(fine) == []
    for change in ({"spilled_bytes": 8}, {"shared_limit": 8}, {"shared_least": 10}, {"matrix_instructions": False}):
        assert len(faults(fine | change)) == 1
