"""Which modules is a decoder block made of? What the native call reads, whatever the family.

Without `mlp_norm` attention and MLP share the input norm, side by side (GPT-J).
"""

from __future__ import annotations

import dataclasses

from slipstream.layers.attention import SelfAttention
from slipstream.layers.linear import Linear
from slipstream.layers.mlp import MLP, GatedMLP
from slipstream.layers.norm import LayerNorm, RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockParts:
    """The modules of one block."""

    attention: SelfAttention
    mlp: GatedMLP | MLP
    input_norm: RMSNorm | LayerNorm
    mlp_norm: RMSNorm | None = None
    post_attention_norm: RMSNorm | None = None
    post_mlp_norm: RMSNorm | None = None

    def linears(self) -> list[Linear]:
        up = self.mlp.gate_up if isinstance(self.mlp, GatedMLP) else self.mlp.up
        return [self.attention.qkv, self.attention.output, up, self.mlp.down]
