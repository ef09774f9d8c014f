"""Every kernel, compiled ahead of time for GPUs that need not be here: no spills, and the matrix units at work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.aot import TARGETS, faults

ROOT = Path(__file__).resolve().parents[1]


def test_kernels_fit_the_chip():
    # All that can be picked on sm_90, one of each operation on the others.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--first", "sm_80", "sm_100", "gfx942"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report for report in reports if report["faults"]] == [], done.stderr
    assert done.returncode == 0, done.stderr
    operations = {arch: {one["operation"] for one in reports if one["arch"] == arch} for arch in TARGETS}
    head = {"partial_sums", "label_logits", "finish", "logits_sums", "brier_topk", "trajectory_reduce", "quantise_rows"}
    all_of_them = head | {"loss_errors", "loss_errors_of_logits", "chi2_solve"}
    assert operations == dict.fromkeys(TARGETS, all_of_them)


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
