"""Which kernels from outside does this engine use? One line for each op that has one, with the reason.

Invariant: nothing is chosen here: `kernels.plugins.choose_kernel` decides at every call, and these are its
words for the calls of this model.
"""

from __future__ import annotations

import torch
from torch import nn

from slipstream.attention.base import AttentionBackend
from slipstream.kernels.plugins import KERNELS, KernelFacts, describe_choices, sm_of
from slipstream.layers.native_block import BlockList

NATIVE = "packed weights run as one native call, which no kernel can enter; dtype='float32' runs op by op"


def load_plugins() -> None:
    """Let installed packages register their kernels. Raises ConfigError naming one that cannot be loaded."""
    KERNELS.load_entry_points()


def facts_of(device: torch.device, dtype: str) -> KernelFacts:
    index = device.index or 0
    return KernelFacts(device=device.type, sm=sm_of(index) if device.type == "cuda" else 0, dtype=dtype)


def kernel_lines(model: nn.Module, backend: AttentionBackend, device: torch.device, dtype: str) -> list[str]:
    """Return the choice for each op that a plugin computes, the model's weights being in place."""
    if not KERNELS.plugins():
        return []
    has_stacks = any(isinstance(module, BlockList) and module.stacks for module in model.modules())
    is_native = has_stacks and backend.capability.native_blocks
    return describe_choices(facts_of(device, dtype), obstacle=NATIVE if is_native else "")
