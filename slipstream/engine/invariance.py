"""Can this engine promise that a token's bits do not depend on the batch? Every part must, or it is refused.

Asked for by `batch_invariant=True`. The parts are the linear layers, attention, what runs between them, and
kernels from outside; sampling and log-probabilities are exact sums in any engine.
Invariant: nothing is replaced here; what cannot keep the promise is named with what could.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from slipstream.attention.base import AttentionBackend
from slipstream.core.errors import ConfigError
from slipstream.engine.kernel_choice import facts_of
from slipstream.kernels.plugins import require_batch_invariant
from slipstream.layers.native_block import BlockList

ASKED = "batch_invariant=True is set, and"


def require_invariance(model: nn.Module, backend: AttentionBackend, device: torch.device, dtype: str) -> None:
    """Raise ConfigError naming the part of a loaded model that cannot keep the promise."""
    for name, module in cast(Any, model).named_modules():
        quant = getattr(module, "quant", None)
        if quant is not None and not quant.capability.batch_invariant:
            raise ConfigError(
                f"{ASKED} the results of {name} ({type(quant).__name__}) depend on what else is in a step; "
                "leave quantization unset."
            )
    if not backend.capability.batch_invariant:
        raise ConfigError(
            f"{ASKED} the results of {type(backend).__name__} depend on what else is in a step; leave "
            "attn_backend='auto'."
        )
    require_batch_invariant(facts_of(device, dtype))
    if device.type == "cpu":
        _require_native(model, backend)


def _require_native(model: nn.Module, backend: AttentionBackend) -> None:
    """Between native calls plain torch would compute, and a vector's tail in other ways than its middle."""
    modules: list[Any] = list(model.modules())
    has_stacks = any(isinstance(module, BlockList) and module.stacks for module in modules)
    has_decoder = getattr(model, "native_decoder", None) is not None
    if not (has_stacks and has_decoder and backend.capability.native_blocks):
        raise ConfigError(
            f"{ASKED} on a CPU the layers of {type(model).__name__} do not run as native calls, between "
            "which plain torch would compute; leave batch_invariant off. In float32 greedy tokens do not "
            "depend on the batch anyway."
        )
