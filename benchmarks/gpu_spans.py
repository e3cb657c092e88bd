"""When did what run on a GPU? Read from a profile of torch's, in milliseconds from the first of it."""

from __future__ import annotations

from typing import Any

import torch

# Start, end, name.
Span = tuple[float, float, str]


def spans_of(profile: Any) -> list[Span]:
    """Return everything that ran on the card, by start."""
    device = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
    events = [e for e in profile.profiler.kineto_results.events() if e.device_type() == device]
    origin = min((event.start_ns() for event in events), default=0)
    found = []
    for event in events:
        start_ms = (event.start_ns() - origin) / 1e6
        found.append((start_ms, start_ms + event.duration_ns() / 1e6, event.name()))
    return sorted(found)
