"""What is a quantisation method? The tensors a linear layer needs, and the product with them.

Invariant: a method owns no tensor and no state: the layer holds what `create` asks for, under those names,
and hands itself to `load` and `apply`. It knows nothing of shards: sizes are those of this rank.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from slipstream.core.capability import Capability

if TYPE_CHECKING:
    from slipstream.kernels.cpu.arena import Arena
    from slipstream.kernels.cpu.packed_matrix import Kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantCapability(Capability):
    """What a method needs. `group_size` is the number of inputs that share a scale, 0 where there is none.

    `native_blocks` says that a decoder block of such weights may run as one native call, `plain_weights` that
    `weight` is the matrix itself, for kernels that read it; `batch_invariant` promises that a token's bits
    depend on nothing else in the step; `takes_ends` says that the method has `apply_with_end` too.
    """

    activation_dtypes: frozenset[str] = frozenset({"float32", "float16", "bfloat16"})
    group_size: int = 0
    native_blocks: bool = False
    plain_weights: bool = False
    batch_invariant: bool = False
    takes_ends: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of a layer. `out_dim` and `in_dim` are its dimensions along outputs and inputs, or None.

    A dimension holds one element per `out_step` outputs (`in_step` inputs), so that the layer can cut a
    packed or a grouped tensor at the same places as a plain one. With `packing`, the shape is that of the
    weights before they are packed, and what is kept is known only when they are read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    out_dim: int | None
    in_dim: int | None
    out_step: int = 1
    in_step: int = 1
    packing: Packing | None = None


class Packing(Protocol):
    """How a method that packs weights while they stream decides on their form, and where they lie."""

    arena: Arena

    def kind_of(self, stored: str) -> Kind:
        """Return the form in which a tensor that the checkpoint stores as `stored` is kept."""
        ...


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

    def look_up(self, layer: Any, ids_T: Tensor) -> Tensor:
        """Return the rows `ids_T` of the weight, [T, in_features]: an embedding."""
        ...


class EndingQuantMethod(QuantMethod, Protocol):
    """A method whose products take along what stands behind them: `takes_ends`."""

    def apply_with_end(
        self, layer: Any, x: Tensor, activation: str = "", residual: Tensor | None = None
    ) -> Tensor:
        """Return act(x @ W^T) + residual; a gated `activation` by Hugging Face's name, "" for none."""
        ...
