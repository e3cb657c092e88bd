"""How do weights run that are packed for the CPU's own kernels? With int8 activations, a scale per group.

The base of the schemes that pack; a scheme says what a stored type becomes (`kind_of`).
Invariant: a token's result does not depend on the others of the step, bit for bit.
Source of the activations' form: Dettmers et al., LLM.int8(), arXiv 2208.07339, section 2; here a scale covers
32 columns of a token instead of its whole row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slipstream.kernels.cpu.arena import Arena
from slipstream.kernels.cpu.packed_matrix import Kind, embedding, linear
from slipstream.quant.base import QuantCapability, TensorSpec


class Packed:
    """Weights [out, in] as packed matrices, one per checkpoint tensor."""

    capability = QuantCapability(
        devices=frozenset({"cpu"}),
        activation_dtypes=frozenset({"float32"}),
        group_size=32,
        native_blocks=True,
        batch_invariant=True,
    )

    def __init__(self) -> None:
        self.arena = Arena()

    def kind_of(self, stored: str) -> Kind:
        """Return the form in which a tensor stored as `stored` is kept."""
        raise NotImplementedError

    def create(self, *, in_features: int, out_features: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        shape = (out_features, in_features)
        return {"weight": TensorSpec(shape=shape, dtype=torch.uint8, out_dim=0, in_dim=1, packing=self)}

    def load(self, layer: Any) -> None:
        """Nothing is left to do: rows were packed as they were read."""

    def apply(self, layer: Any, x: Tensor) -> Tensor:
        parts = [linear(x, matrix) for matrix in layer.weight.in_order()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def look_up(self, layer: Any, ids_T: Tensor) -> Tensor:
        return embedding(layer.weight.in_order()[0], ids_T)
