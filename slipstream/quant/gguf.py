"""How do a GGUF file's quantised tensors stay as they are? Each in its own type, repacked while it streams.

Types without a kernel (Q2_K, Q3_K, IQ4_NL, IQ4_XS, MXFP4) become int8 in groups of 32, which holds their few
levels with an error far below their own.
"""

from __future__ import annotations

from slipstream.kernels.cpu.packed_matrix import Kind, native_kind
from slipstream.quant.packed import Packed

# Floating types without a kernel of their own; float32 holds them exactly, or nearly (F64).
WIDENED = ("F16", "F64")


class Gguf(Packed):
    """The file's own types, by the CPU kernels."""

    def kind_of(self, stored: str) -> Kind:
        if stored in WIDENED:
            return Kind.F32
        kind = native_kind(stored)
        return Kind.Q8_GROUP if kind is None else kind
