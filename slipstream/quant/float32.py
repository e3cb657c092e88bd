"""How do weights run in float32 on a CPU with the same bits in every batch? Packed for the CPU's own kernels.

Their products add up in one order, whatever the number of tokens and of threads, which a vendor's library
does not promise. Quantised tensors are widened as they are read.
Invariant: a token's result does not depend on the others of the step, bit for bit.
"""

from __future__ import annotations

from slipstream.kernels.cpu.packed_matrix import Kind
from slipstream.quant.packed import Packed


class Float32(Packed):
    """Weights and activations in float32, by the CPU kernels."""

    def kind_of(self, stored: str) -> Kind:
        return Kind.F32
