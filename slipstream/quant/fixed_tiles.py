"""How do weights as they are run on a GPU with the same bits in every batch? By products of one fixed shape.

The matrix is that of `Unquantized`; the product is `kernels/fixed_linear.py`'s, in which a token's sum is
taken in one order whatever the step holds. Nothing is fused with it.
Source: He et al., Defeating Nondeterminism in LLM Inference, Thinking Machines Lab, 2025.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slipstream.kernels.fixed_linear import fixed_linear_op
from slipstream.quant.base import QuantCapability
from slipstream.quant.unquantized import Unquantized


class FixedTiles(Unquantized):
    """`weight` [out, in] in the model's type, met by tiles of one shape."""

    capability = QuantCapability(devices=frozenset({"cuda"}), batch_invariant=True)

    def apply(self, layer: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return fixed_linear_op(flat, layer.weight).view(*x.shape[:-1], -1)
