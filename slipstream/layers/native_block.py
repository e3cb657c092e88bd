"""Which decoder blocks can run as native calls? Those whose parts the CPU kernels know.

The block composed of layers (`layers/decoder_block.py`) is the reference; whether its weights allow the call
is seen once they are in place, whether a step does by its attention backend's capability.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from slipstream.core.batch import ForwardBatch
from slipstream.layers.block_parts import BlockParts
from slipstream.layers.native_call import NativeCall, NativeStack


class NativeBlock(nn.Module):
    """Base of blocks that may run natively: `native` is set once the weights are in place."""

    native: NativeCall | None = None

    def parts(self) -> BlockParts:
        raise NotImplementedError

    def find_native(self) -> None:
        """Make the native form, where there is one."""
        parts = self.parts()
        linears = parts.linears()
        if all(linear.quant.capability.native_blocks and linear.mesh.tp_size == 1 for linear in linears):
            self.native = NativeCall(parts)


class BlockList(nn.ModuleList):
    """The layers of a model. Where all have a native form, neighbours of one layout run as one call."""

    stacks: tuple[NativeStack, ...] = ()

    def find_stacks(self) -> None:
        """Join the layers' native forms, if every layer has one."""
        calls = [
            layer.native for layer in self if isinstance(layer, NativeBlock) and layer.native is not None
        ]
        if len(calls) == len(self):
            groups = itertools.groupby(calls, key=lambda call: call.layout())
            self.stacks = tuple(NativeStack(list(group)) for _, group in groups)

    def run_natively(self, x_TD: Tensor, batch: ForwardBatch) -> Tensor | None:
        """Replace `x_TD` by the last layer's output, or return None where the layers must run one by one."""
        if not self.stacks or not batch.attention_plan.backend.capability.native_blocks:
            return None
        for stack in self.stacks:
            x_TD = stack.run(x_TD, batch)
        return x_TD
