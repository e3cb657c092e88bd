"""Which attention backends are there, and which one serves a given model on a given device?

Invariant: the choice is a pure function of (name, device, cache groups) and comes with its reason; a backend
asked for by name is used or refused, never replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from slipstream.attention.base import AttentionBackend, AttentionCapability
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import ConfigError, UnsupportedError
from slipstream.core.registry import Registry

BACKENDS = Registry(
    "attention backend",
    {
        "torch": "slipstream.attention.torch_reference:TorchReference",
        "triton": "slipstream.attention.triton:TritonAttention",
        "triton_invariant": "slipstream.attention.triton_invariant:TritonInvariant",
        "cpu": "slipstream.attention.cpu:CpuPaged",
    },
)

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
# Best first; `auto` takes the first one that serves the device and every group.
PREFERENCE = ("triton", "triton_invariant", "cpu", "torch")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """What the choice depends on beside the model. `sm` is the compute capability x 10, 0 where unknown.

    `dtype` is the type of keys and values, "" where it does not matter. `native_obstacle` says why the CPU
    kernels cannot be had, "" where they can. `is_batch_invariant` says that results must not depend on the
    batch.
    """

    device: str
    sm: int = 0
    has_triton: bool = True
    dtype: str = ""
    native_obstacle: str = ""
    is_batch_invariant: bool = False

    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]


def choose_backend(
    name: str, facts: DeviceFacts | str, groups: Sequence[CacheGroup]
) -> tuple[AttentionBackend, str]:
    """Return the backend for `name` ("auto" or a row of `BACKENDS`) and one sentence saying why.

    `facts` may be a torch device or its type alone, e.g. "cpu" or "cuda:0". Raises ConfigError for an unknown
    name and for a backend that cannot serve the device or a group, saying which demand it fails and which
    backends meet them all.
    """
    if isinstance(facts, str):
        facts = DeviceFacts(device=facts)
    kind = facts.kind
    if name != "auto":
        row = BACKENDS.get(name)
        obstacle = find_obstacle(row.capability, facts, groups)
        if obstacle:
            others = [other for other in PREFERENCE if other != name and _serves(other, facts, groups)]
            advice = f"Use {' or '.join(map(repr, others))}, or" if others else "Use"
            raise ConfigError(
                f"Attention backend {name!r} cannot be used: {obstacle}. {advice} 'auto' to let us choose."
            )
        return row(), f"attention backend {name!r}: asked for by name"
    obstacles: list[str] = []
    for candidate in PREFERENCE:
        row = BACKENDS.get(candidate)
        obstacle = find_obstacle(row.capability, facts, groups)
        if not obstacle:
            skipped = f"; passed over: {'; '.join(obstacles)}" if obstacles else ""
            return (
                row(),
                f"attention backend {candidate!r}: first that serves {kind} and this model{skipped}",
            )
        if kind in row.capability.devices:
            obstacles.append(f"{candidate}: {obstacle}")
    raise ConfigError(
        f"No attention backend serves this model on {kind}: {'; '.join(obstacles)}."
        + _advice_elsewhere(facts, groups)
    )


def _advice_elsewhere(facts: DeviceFacts, groups: Sequence[CacheGroup]) -> str:
    """Return which backends would serve the model on another kind of device, or in another type."""
    changes = [{"device": device} for device in DEVICES if device != facts.kind]
    changes += [{"dtype": dtype} for dtype in DTYPES if facts.dtype and dtype != facts.dtype]
    for change in changes:
        other = dataclasses.replace(facts, **change)
        names = [name for name in PREFERENCE if _serves(name, other, groups)]
        if names:
            name, value = next(iter(change.items()))
            return f" With {name}={value!r}, {' or '.join(map(repr, names))} would."
    return ""


def _serves(name: str, facts: DeviceFacts, groups: Sequence[CacheGroup]) -> bool:
    return not find_obstacle(BACKENDS.get(name).capability, facts, groups)


def find_obstacle(
    capability: AttentionCapability, facts: DeviceFacts | str, groups: Sequence[CacheGroup]
) -> str:
    """Return the first demand that `capability` does not meet, or an empty string."""
    if isinstance(facts, str):
        facts = DeviceFacts(device=facts)
    if facts.kind not in capability.devices:
        return f"it runs on {', '.join(sorted(capability.devices))}, not on {facts.kind}"
    if 0 < facts.sm < capability.min_sm:
        return (
            f"it needs compute capability {_dotted(capability.min_sm)}, and this GPU has {_dotted(facts.sm)}"
        )
    if capability.needs_triton and not facts.has_triton:
        return "it needs triton, which is not installed (pip install triton)"
    if capability.native_blocks and facts.native_obstacle:
        return f"the CPU kernels cannot be had: {facts.native_obstacle}"
    if facts.dtype and facts.dtype not in capability.kv_dtypes:
        return f"it serves keys and values of {', '.join(sorted(capability.kv_dtypes))}, not {facts.dtype}"
    if facts.is_batch_invariant and not capability.batch_invariant:
        return "batch_invariant=True is set, and its results depend on what else is in a step"
    for group in groups:
        obstacle = _group_obstacle(capability, group)
        if obstacle:
            return obstacle
    return ""


def require_trees(backend: AttentionBackend, facts: DeviceFacts, groups: Sequence[CacheGroup]) -> None:
    """Raise UnsupportedError, naming backends that would do, where trees of drafts are not served."""
    if backend.capability.tree:
        return
    name = next((name for name in BACKENDS if BACKENDS.get(name) is type(backend)), type(backend).__name__)
    others = [
        repr(other)
        for other in PREFERENCE
        if BACKENDS.get(other).capability.tree and _serves(other, facts, groups)
    ]
    advice = f"attn_backend={' or '.join(others)} does" if others else "none does for this model"
    raise UnsupportedError(
        f"Attention backend {name!r} serves no trees of drafts; on {facts.kind}, {advice}. Use that, or "
        "draft no trees."
    )


def _dotted(sm: int) -> str:
    return f"{sm // 10}.{sm % 10}"


def _group_obstacle(capability: AttentionCapability, group: CacheGroup) -> str:
    served = (
        {"full"} | ({"window"} if capability.window else set()) | ({"latent"} if capability.latent else set())
    )
    if group.kind not in served:
        return f"it serves {', '.join(sorted(served))} groups, and layer {group.layers[0]} needs {group.kind}"
    if capability.head_dims and group.head_dim not in capability.head_dims:
        return f"it serves head sizes {_listed(capability.head_dims)}, and this model has {group.head_dim}"
    if group.block_tokens and capability.page_sizes and group.block_tokens not in capability.page_sizes:
        return f"it serves {sorted(capability.page_sizes)} tokens per block, and {group.block_tokens} are set"
    return ""


def _listed(sizes: frozenset[int]) -> str:
    """Return the sizes in order; a long even row of them by its ends."""
    ordered = sorted(sizes)
    step = ordered[1] - ordered[0] if len(ordered) > 1 else 0
    if len(ordered) > 6 and ordered == list(range(ordered[0], ordered[-1] + 1, step)):
        return f"[{ordered[0]}, {ordered[1]}, ..., {ordered[-1]}]"
    return str(ordered)
