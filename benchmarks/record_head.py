"""What a record of a replay begins with: where, when, of what."""

import argparse
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import baselines
from benchmarks.fingerprint import fingerprints
from lark_fast.versions import versions


def record_head(options: argparse.Namespace) -> dict[str, Any]:
    """From the ``commit``, ``student``, ``pool`` and ``max_length`` of a command; no path of this machine."""
    return {
        "device": baselines.device_name(),
        "versions": versions("torch", "transformers", "numpy"),
        "date": date.today().isoformat(),
        "commit": options.commit,
        "kernels_sha256": fingerprints(),
        "student": Path(options.student).name,
        "pool": Path(options.pool).name,
        "max_length": options.max_length,
    }
