"""Which kernels does this engine use where there are several? A line for each choice, with the reason.

Invariant: nothing is chosen here: `kernels.plugins.choose_kernel` and the attention backend decide at every
call, and these are their words for the calls of this model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from slipstream.attention.base import AttentionBackend
from slipstream.core.cache_group import CacheGroup
from slipstream.kernels.plugins import KERNELS, KernelFacts, describe_choices, sm_of
from slipstream.layers.native_block import BlockList

NATIVE = "packed weights run as one native call, which no kernel can enter; dtype='float32' runs op by op"


def load_plugins() -> None:
    """Let installed packages register their kernels. Raises ConfigError naming one that cannot be loaded."""
    KERNELS.load_entry_points()


def facts_of(device: torch.device, dtype: str) -> KernelFacts:
    index = device.index or 0
    return KernelFacts(device=device.type, sm=sm_of(index) if device.type == "cuda" else 0, dtype=dtype)


def kernel_lines(
    model: nn.Module,
    backend: AttentionBackend,
    groups: Sequence[CacheGroup],
    device: torch.device,
    dtype: str,
) -> list[str]:
    """Return the choices of the attention backend, and that for each op that a plugin computes.

    The model's weights are in place.
    """
    facts = facts_of(device, dtype)
    describe = getattr(backend, "describe_kernels", None)
    lines: list[str] = describe(groups, sm=facts.sm, dtype=dtype) if describe is not None else []
    if not KERNELS.plugins():
        return lines
    has_stacks = any(isinstance(module, BlockList) and module.stacks for module in model.modules())
    is_native = has_stacks and backend.capability.native_blocks
    return lines + describe_choices(facts, obstacle=NATIVE if is_native else "")
