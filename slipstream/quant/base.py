"""What is a quantisation method? The tensors a linear layer needs, and the product with them.

Invariant: a method owns no tensor and no state: the layer holds what `create` asks for, under those names,
and hands itself to `load` and `apply`. It knows nothing of shards: sizes are those of this rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from slipstream.core.capability import Capability


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantCapability(Capability):
    """What a method needs. `group_size` is the number of inputs that share a scale, 0 where there is none."""

    activation_dtypes: frozenset[str] = frozenset({"float32", "float16", "bfloat16"})
    group_size: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of a layer. `out_dim` and `in_dim` are its dimensions along outputs and inputs, or None.

    A dimension holds one element per `out_step` outputs (`in_step` inputs), so that the layer can cut a
    packed or a grouped tensor at the same places as a plain one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    out_dim: int | None
    in_dim: int | None
    out_step: int = 1
    in_step: int = 1


class QuantMethod(Protocol):
    """One way to store and apply the weights of a linear layer."""

    capability: QuantCapability

    def create(self, *, in_features: int, out_features: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Return the tensors of a layer of this size, by the attribute name the layer keeps them under."""
        ...

    def load(self, layer: Any) -> None:
        """Finish `layer` once every tensor is placed, e.g. repack them. Called once."""
        ...

    def apply(self, layer: Any, x: Tensor) -> Tensor:
        """Return x @ W^T of `x` [..., in_features], without bias."""
        ...
