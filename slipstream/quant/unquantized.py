"""How does a linear layer run with the weights as they are? One matrix in the model's own type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from slipstream.kernels.fused_linear import fused_linear_op
from slipstream.quant.base import QuantCapability, TensorSpec

# Beyond so many tokens a product is the vendor's library's alone; a registered op costs the host time.
MAX_FUSED = 256


class Unquantized:
    """Keeps `weight` [out, in] in the model's type."""

    capability = QuantCapability(plain_weights=True)

    def create(self, *, in_features: int, out_features: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(shape=(out_features, in_features), dtype=dtype, out_dim=0, in_dim=1)}

    def load(self, layer: Any) -> None:
        """Nothing is left to do: the weight is used as it was placed."""

    def apply(self, layer: Any, x: Tensor) -> Tensor:
        if x.is_cuda and x.ndim == 2 and len(x) <= MAX_FUSED:
            return fused_linear_op(x, layer.weight, None, 0.0, None, "", None)
        return linear(x, layer.weight)

    def look_up(self, layer: Any, ids_T: Tensor) -> Tensor:
        return embedding(ids_T, layer.weight)
