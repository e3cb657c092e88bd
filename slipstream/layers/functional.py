"""Which ops may a model call? The registered ones, under one roof for model authors."""

from __future__ import annotations

from slipstream.kernels.gelu_and_mul import gelu_and_mul as gelu_and_mul
from slipstream.kernels.gelu_and_mul import gelu_tanh_and_mul as gelu_tanh_and_mul
from slipstream.kernels.rms_norm import add_rms_norm as add_rms_norm
from slipstream.kernels.rms_norm import rms_norm as rms_norm
from slipstream.kernels.rotary import rotary as rotary
from slipstream.kernels.rotary import rotary_table as rotary_table
from slipstream.kernels.silu_and_mul import silu_and_mul as silu_and_mul

__all__ = [
    "add_rms_norm",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "rms_norm",
    "rotary",
    "rotary_table",
    "silu_and_mul",
]
