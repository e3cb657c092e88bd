"""Which decoder blocks can run as one native call? Those whose parts the CPU kernels know.

The block composed of layers (`layers/decoder_block.py`) is the reference; whether its weights allow the call
is seen once they are in place, whether a step does by its attention backend's capability.
"""

from __future__ import annotations

from torch import nn

from slipstream.core.batch import ForwardBatch
from slipstream.layers.block_parts import BlockParts
from slipstream.layers.native_call import NativeCall


def find_native_block(parts: BlockParts) -> NativeCall | None:
    """Return a block's native form, or None where its weights or its parts have none."""
    linears = parts.linears()
    if not all(linear.quant.capability.native_blocks and linear.mesh.tp_size == 1 for linear in linears):
        return None
    return NativeCall(parts)


class NativeBlocks(nn.Module):
    """Base of blocks that may run natively: `native` is set once the weights are in place."""

    native: NativeCall | None = None

    def parts(self) -> BlockParts:
        raise NotImplementedError

    def find_native(self) -> None:
        """Take the native form from here on, where there is one."""
        self.native = find_native_block(self.parts())

    def runs_natively(self, batch: ForwardBatch) -> bool:
        return self.native is not None and batch.attention_plan.backend.capability.native_blocks
