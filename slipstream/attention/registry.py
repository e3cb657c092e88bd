"""Which attention backends are there, and which one serves a given model on a given device?

Invariant: the choice is a pure function of (name, device, cache groups) and comes with its reason; a backend
asked for by name is used or refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.attention.base import AttentionBackend, AttentionCapability
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import ConfigError
from slipstream.core.registry import Registry

BACKENDS = Registry("attention backend", {"torch": "slipstream.attention.torch_reference:TorchReference"})

# Best first; `auto` takes the first one that serves the device and every group.
PREFERENCE = ("torch",)


def choose_backend(name: str, device: str, groups: Sequence[CacheGroup]) -> tuple[AttentionBackend, str]:
    """Return the backend for `name` ("auto" or a row of `BACKENDS`) and one sentence saying why.

    `device` is a torch device or its type, e.g. "cpu" or "cuda:0". Raises ConfigError for an unknown name and
    for a backend that cannot serve the device or a group, saying which demand it fails.
    """
    kind = device.partition(":")[0]
    if name != "auto":
        backend: AttentionBackend = BACKENDS.get(name)()
        obstacle = find_obstacle(backend.capability, kind, groups)
        if obstacle:
            raise ConfigError(
                f"Attention backend {name!r} cannot be used: {obstacle}. Use 'auto' to let us choose."
            )
        return backend, f"attention backend {name!r}: asked for by name"
    obstacles: list[str] = []
    for candidate in PREFERENCE:
        backend = BACKENDS.get(candidate)()
        obstacle = find_obstacle(backend.capability, kind, groups)
        if not obstacle:
            skipped = f"; passed over: {'; '.join(obstacles)}" if obstacles else ""
            return (
                backend,
                f"attention backend {candidate!r}: first that serves {kind} and this model{skipped}",
            )
        obstacles.append(f"{candidate}: {obstacle}")
    raise ConfigError(f"No attention backend serves this model on {kind}: {'; '.join(obstacles)}.")


def find_obstacle(capability: AttentionCapability, device: str, groups: Sequence[CacheGroup]) -> str:
    """Return the first demand that `capability` does not meet, or an empty string."""
    if device not in capability.devices:
        return f"it runs on {', '.join(sorted(capability.devices))}, not on {device}"
    for group in groups:
        obstacle = _group_obstacle(capability, group)
        if obstacle:
            return obstacle
    return ""


def _group_obstacle(capability: AttentionCapability, group: CacheGroup) -> str:
    served = (
        {"full"} | ({"window"} if capability.window else set()) | ({"latent"} if capability.latent else set())
    )
    if group.kind not in served:
        return f"it serves {', '.join(sorted(served))} groups, and layer {group.layers[0]} needs {group.kind}"
    if capability.head_dims and group.head_dim not in capability.head_dims:
        return f"it serves head sizes {sorted(capability.head_dims)}, and this model has {group.head_dim}"
    if group.block_tokens and capability.page_sizes and group.block_tokens not in capability.page_sizes:
        return f"it serves {sorted(capability.page_sizes)} tokens per block, and {group.block_tokens} are set"
    return ""
