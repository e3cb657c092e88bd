"""What does the choice of an attention backend depend on, on this machine?"""

from __future__ import annotations

import torch

from slipstream.attention.registry import DeviceFacts
from slipstream.kernels.registration import has_triton


def facts_of(
    device: torch.device, *, kv_dtype: str, native_obstacle: str, is_batch_invariant: bool = False
) -> DeviceFacts:
    """Look at a device; `native_obstacle` says why the CPU kernels cannot be had, "" where they can."""
    sm = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        sm = 10 * major + minor
    return DeviceFacts(
        device=str(device),
        sm=sm,
        has_triton=has_triton(),
        dtype=kv_dtype,
        native_obstacle=native_obstacle,
        is_batch_invariant=is_batch_invariant,
    )
