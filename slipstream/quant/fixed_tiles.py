"""How do weights as they are run on a GPU with the same bits in every batch? By products of one order.

The matrix is that of `Unquantized`; the product is `kernels/fixed_linear.py`'s, in which a token's sum is
taken in one order whatever the step holds. A gated activation and a residual may be taken along.
Source: He et al., Defeating Nondeterminism in LLM Inference, Thinking Machines Lab, 2025.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slipstream.kernels.fixed_linear import fixed_linear_op
from slipstream.quant.base import QuantCapability
from slipstream.quant.unquantized import Unquantized


class FixedTiles(Unquantized):
    """`weight` [out, in] in the model's type, met by products of one order."""

    capability = QuantCapability(devices=frozenset({"cuda"}), batch_invariant=True, takes_ends=True)

    def apply(self, layer: Any, x: Tensor) -> Tensor:
        return self.apply_with_end(layer, x)

    def apply_with_end(
        self, layer: Any, x: Tensor, activation: str = "", residual: Tensor | None = None
    ) -> Tensor:
        """Return act(x @ W^T) + residual, which the kernel computes together."""
        flat_TI = x.reshape(-1, x.shape[-1])
        residual_TO = None if residual is None else residual.reshape(len(flat_TI), -1)
        y_TO = fixed_linear_op(flat_TI, layer.weight, activation, residual_TO)
        return y_TO.view(*x.shape[:-1], -1)
