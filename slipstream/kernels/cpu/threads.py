"""How many threads do the CPU kernels use? Torch's number, but no more than there are physical cores here.

`OMP_NUM_THREADS` or `torch.set_num_threads` is the one setting. A second thread on a core would wait for the
same arithmetic units, and one beyond the cores would be waited for at every barrier.
"""

from __future__ import annotations

import os

import psutil
import torch

from slipstream.kernels.cpu.library import library


def use_threads() -> int:
    """Give the pool its number of threads, and return it. Waits for a kernel that is running."""
    wanted = min(torch.get_num_threads(), num_cores())
    if library().ss_num_threads() != wanted:
        library().ss_set_threads(wanted)
    return wanted


def num_cores() -> int:
    """Return the physical cores that this process may use, at least 1."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))
