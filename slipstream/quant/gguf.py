"""How do a GGUF file's quantised tensors stay as they are? Each in its own type, repacked while it streams.

Types without a kernel (Q2_K, Q3_K, IQ4_NL, IQ4_XS, MXFP4) become int8 in groups of 32, which holds their few
levels with an error far below their own.
"""

from __future__ import annotations

from slipstream.kernels.cpu.packed_matrix import Kind, native_kind
from slipstream.quant.packed import Packed


class Gguf(Packed):
    """The file's own types, by the CPU kernels."""

    def kind_of(self, stored: str) -> Kind:
        return native_kind(stored) or Kind.Q8_GROUP
