"""What does the native call of a block look like from here? A record of its weights, and one function.

Invariant: a record's addresses are of parameters that are kept beside it; the hidden state is replaced in
place.
"""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from slipstream.attention.cpu import round_up_seq_len
from slipstream.core.batch import ForwardBatch
from slipstream.kernels.cpu.block_records import ACTIVATIONS, Block
from slipstream.kernels.cpu.library import library
from slipstream.kernels.cpu.packed_matrix import Kind, Matrix
from slipstream.layers.block_parts import BlockParts
from slipstream.layers.linear import Linear
from slipstream.layers.mlp import GatedMLP
from slipstream.layers.norm import LayerNorm
from slipstream.layers.rotary import Rotary


class NativeStack:
    """Consecutive blocks of one layout, run by one call. `num_calls` counts the steps that ran this way."""

    def __init__(self, calls: list[NativeCall]) -> None:
        self._library = library()
        self.calls = calls
        self._records = (ctypes.c_void_p * len(calls))(*(ctypes.addressof(call.record) for call in calls))
        self.address = ctypes.addressof(self._records)
        self._places: Any = None
        # Layers share one or two rotary embeddings, and their tables change only as sequences grow.
        self._turned: dict[Rotary, list[NativeCall]] = {}
        self._tables: dict[Rotary, Tensor] = {}
        for call in calls:
            self._turned.setdefault(call.rotary, []).append(call)
        self.num_calls = 0

    def run(self, x_TD: Tensor, batch: ForwardBatch) -> Tensor:
        """Replace `x_TD` [T, D] float32 by the last block's output, and return it."""
        plan = batch.attention_plan
        step = plan.backend.native_step(batch)
        self.prepare(batch.layer_place, step.layer_strides, plan.max_seq_len)
        longest = round_up_seq_len(step.max_seq_len)
        scratch = step.scratch.fit(
            (self.address, step.tokens, longest),
            lambda: self._library.ss_block_scratch_bytes(self._records[0], step.tokens, longest),
        )
        status = self._library.ss_decoder_blocks(
            self.address, len(self.calls), step.address, x_TD.data_ptr(), scratch
        )
        assert status == 0, "the backend's capability lets no other head size through"
        self.num_calls += 1
        return x_TD

    def prepare(self, layer_place: list[tuple[int, int]], layer_strides: list[int], max_seq_len: int) -> None:
        """Point the records to where the layers' pages lie, and to tables for so many positions."""
        if layer_place is not self._places:
            for call in self.calls:
                call.bind(layer_place, layer_strides)
            self._places = layer_place
        for rotary, calls in self._turned.items():
            table = rotary.table(max_seq_len)
            if table is not self._tables.get(rotary):
                self._tables[rotary] = table
                for call in calls:
                    call.record.rotary_table = table.data_ptr()


class NativeCall:
    """One block as the CPU kernels read it."""

    def __init__(self, parts: BlockParts) -> None:
        self._kept: list[Any] = []
        self.rotary = parts.attention.rotary
        self._layer_idx = parts.attention.attention.spec.layer_idx
        self.record = self._fill(parts)

    def bind(self, layer_place: list[tuple[int, int]], layer_strides: list[int]) -> None:
        """Say where this layer's keys and values lie; the same in every step of an engine."""
        group, place = layer_place[self._layer_idx]
        self.record.group = group
        self.record.place_offset = place * layer_strides[group]

    def layout(self) -> tuple[Any, ...]:
        """Return what decides on the scratch of a call: sizes, and which forms of activations are read."""
        record = self.record
        sizes = (record.hidden, record.heads, record.kv_heads, record.head_dim, record.intermediate)
        readers = ((record.q, record.k, record.v, record.gate, record.up), (record.output,), (record.down,))
        forms = tuple(
            frozenset(Kind(matrix.kind).is_floating for matrix in matrices if matrix.data)
            for matrices in readers
        )
        return sizes + forms

    def _fill(self, parts: BlockParts) -> Block:
        attention, mlp = parts.attention, parts.mlp
        spec = attention.attention.spec
        record = Block(
            hidden=attention.qkv.in_features,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            intermediate=mlp.down.in_features,
            window=spec.window,
            activation=ACTIVATIONS[mlp.activation_name],
            is_gated=isinstance(mlp, GatedMLP),
            is_parallel=parts.mlp_norm is None,
            is_layer_norm=isinstance(parts.input_norm, LayerNorm),
            is_interleaved=attention.rotary.interleaved,
            norm_eps=parts.input_norm.eps,
            scale=spec.scale,
            softcap=spec.softcap,
        )
        self._fill_linear(record, attention.qkv, {"q": "q", "k": "k", "v": "v"})
        self._fill_linear(record, attention.output, {"": "output"})
        if isinstance(mlp, GatedMLP):
            self._fill_linear(record, mlp.gate_up, {"gate": "gate", "up": "up"})
        else:
            self._fill_linear(record, mlp.up, {"": "up"})
        self._fill_linear(record, mlp.down, {"": "down"})
        norms = {
            "input_norm": parts.input_norm,
            "q_norm": attention.q_norm,
            "k_norm": attention.k_norm,
            "post_attention_norm": parts.post_attention_norm,
            "mlp_norm": parts.mlp_norm,
            "post_mlp_norm": parts.post_mlp_norm,
        }
        for name, norm in norms.items():
            if norm is not None:
                setattr(record, name, self._keep(norm.weight))
        if isinstance(parts.input_norm, LayerNorm):
            record.input_norm_bias = self._keep(parts.input_norm.bias)
        return record

    def _fill_linear(self, record: Block, linear: Linear, fields: dict[str, str]) -> None:
        """Fill in the matrix, and the bias where there is one, of each slot."""
        weight: Any = linear.weight
        for slot, field in fields.items():
            matrix = weight.matrices[slot]
            self._kept.append(matrix)
            setattr(record, field, Matrix.from_buffer_copy(matrix.record))
            if linear.bias is not None:
                offset = weight.slots[slot].offset * linear.bias.element_size()
                setattr(record, f"{field}_bias", self._keep(linear.bias) + offset)

    def _keep(self, parameter: Tensor) -> int:
        self._kept.append(parameter)
        return parameter.data_ptr()
