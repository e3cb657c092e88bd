"""In what portions is the work of one-token rows dealt out on a GPU? Planner and kernels must agree.

A unit is a block of keys of one row and kv head, what a program reads at once.
"""

from __future__ import annotations

import functools

import torch

# What a multiprocessor holds of the kernel at once: more would wait for a second turn, a whole share long.
PROGRAMS_PER_SM = 4
# Programs where nothing runs side by side: enough for shares to begin and end anywhere.
CPU_PROGRAMS = 16
# Units: no share is shorter than this, and no border stands closer to the end of a row and kv head.
SHORTEST = 2


def keys_of_unit(dtype: torch.dtype, head_size: int) -> int:
    """Return how many keys are read at once; borders and kernel must agree."""
    return 32 if dtype == torch.float32 or head_size > 128 else 64


@functools.cache
def num_programs(device: torch.device) -> int:
    """Return how many programs run at once on a device."""
    if device.type != "cuda":
        return CPU_PROGRAMS
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
