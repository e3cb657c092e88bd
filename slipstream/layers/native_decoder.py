"""How does a whole decoder run natively? Its look-up, final norm and head, joined to the calls of its blocks.

Invariant: a step of this kind and any other give a row the same bits; so the norm is the kernels' in both.
"""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from slipstream.kernels.cpu.block_records import Decoder
from slipstream.kernels.cpu.library import library
from slipstream.kernels.cpu.packed_matrix import Matrix
from slipstream.layers.embedding import LMHead, VocabEmbedding
from slipstream.layers.native_block import BlockList
from slipstream.layers.native_call import NativeStack
from slipstream.layers.norm import LayerNorm, RMSNorm
from slipstream.layers.packed_parameter import PackedParameter


class NativeDecoder:
    """A decoder's record for the kernels, and its final norm."""

    def __init__(
        self, stack: NativeStack, embedding: VocabEmbedding, norm: RMSNorm | LayerNorm, head: LMHead
    ) -> None:
        self.stack = stack
        self._library = library()
        self._norm = norm
        self._kept: list[Any] = [embedding.weight, head.weight, head.bias]
        self.record = Decoder(
            blocks=stack.address,
            num_blocks=len(stack.calls),
            embedding=_matrix(embedding.weight),
            head=_matrix(head.weight),
            norm=norm.weight.data_ptr(),
            norm_bias=norm.bias.data_ptr() if isinstance(norm, LayerNorm) else None,
            head_bias=None if head.bias is None else head.bias.data_ptr(),
            embedding_scale=embedding.scale,
            norm_eps=norm.eps,
            is_layer_norm=isinstance(norm, LayerNorm),
        )
        self.address = ctypes.addressof(self.record)

    def norm(self, x_TD: Tensor) -> Tensor:
        """Norm `x_TD` float32 in place, as the kernels do at the end of a step."""
        record = self.record
        self._library.ss_norm(
            x_TD.data_ptr(), record.norm, record.norm_bias, self._norm.eps, *x_TD.shape, x_TD.data_ptr()
        )
        return x_TD


def find_native_decoder(
    layers: BlockList, embedding: VocabEmbedding, norm: Any, head: LMHead
) -> NativeDecoder | None:
    """Return the native form of a decoder, or None where a part of it has none."""
    packed = (embedding.weight, head.weight)
    if len(layers.stacks) != 1 or not all(isinstance(weight, PackedParameter) for weight in packed):
        return None
    if embedding.mesh.tp_size > 1 or not isinstance(norm, (RMSNorm, LayerNorm)):
        return None
    return NativeDecoder(layers.stacks[0], embedding, norm, head)


def _matrix(weight: Any) -> Matrix:
    return Matrix.from_buffer_copy(weight.in_order()[0].record)
