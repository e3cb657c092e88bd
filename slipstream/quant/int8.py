"""How does an unquantised checkpoint run in int8? Symmetric weights, a scale per output, on the CPU kernels.

Source: Dettmers et al., LLM.int8(), arXiv 2208.07339, section 2.1 (vector-wise quantisation of the weights).
"""

from __future__ import annotations

from slipstream.core.errors import CheckpointError
from slipstream.kernels.cpu.packed_matrix import Kind
from slipstream.quant.packed import Packed

FLOATING = ("F64", "F32", "F16", "BF16")


class Int8(Packed):
    """Int8 weights with a scale per output."""

    def kind_of(self, stored: str) -> Kind:
        if stored not in FLOATING:
            raise CheckpointError(
                f"quantization='int8' takes weights in {', '.join(FLOATING)}, and this file holds "
                f"{stored}: it is quantised already; leave quantization unset."
            )
        return Kind.Q8_ROW
