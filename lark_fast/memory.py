"""How much memory there is for what is not there yet."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def available_memory(device: "torch.device | None" = None) -> int:
    """Bytes that can be had: of a GPU, with what torch holds in reserve, or of this machine without swapping, caches of
    files too; 0 if nobody knows."""
    if device is not None and device.type == "cuda":
        import torch

        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
