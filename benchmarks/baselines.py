"""How far above its limit each benchmark was, by device and versions, and whether a new ratio is worse.

Only ratios are kept and judged: a limit measured in the same run slows down with the machine, so the ratio stays.
``<folder>/<device>.json`` holds {versions: {benchmark: ratio to limit}}.
"""

import json
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "baselines"
ALLOWED = {"cuda": 0.15, "cpu": 0.30}  # how much worse a ratio may be, by kind of device


def device_name() -> str:
    """The GPU, or the CPU and how many of its threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> str:
    """Of what makes the machine code."""
    try:
        return f"torch {torch.__version__}, triton {version('triton')}"
    except PackageNotFoundError:
        return f"torch {torch.__version__}, no triton"


def path_for(folder: Path) -> Path:
    """This device's file."""
    return folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', device_name())}.json"


def load(folder: Path) -> dict[str, float]:
    """Ratio of every benchmark with a baseline for this device and these versions."""
    path = path_for(folder)
    return json.loads(path.read_text()).get(versions(), {}) if path.exists() else {}


def save(folder: Path, ratios: Mapping[str, float]) -> Path:
    """Put these ratios in the place of what was there for the same benchmarks, and leave all others."""
    path = path_for(folder)
    known = json.loads(path.read_text()) if path.exists() else {}
    known[versions()] = known.get(versions(), {}) | {name: round(ratio, 4) for name, ratio in ratios.items()}
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    draft.replace(path)
    return path


def complaint(ratio: float, baseline: float, device: str) -> str | None:
    """What to say of a ratio that is worse than its baseline by more than a ``device`` ("cuda", "cpu") may vary."""
    worse = ratio / baseline - 1.0
    if worse <= ALLOWED[device]:
        return None
    return (
        f"{ratio:.3f}x its limit, {worse:.0%} worse than the baseline {baseline:.3f}x; {ALLOWED[device]:.0%} is allowed"
    )
