"""How much memory did this process need at most? Resident memory on a CPU, allocated memory on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory_bytes(device: str) -> int:
    """Return the peak of this process so far, in bytes. `device` is "cpu" or a CUDA device."""
    if device.partition(":")[0] == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the highest resident size of this process."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: on Linux its peak includes that of the program which started this one.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
