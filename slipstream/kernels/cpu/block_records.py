"""What do the block kernels read? Python's mirror of the records in `src/`.

Invariant: fields, order and widths are those of the C++ records; `tests/kernels/cpu/test_block_records.py`
compares the sizes. Addresses are plain integers: who fills a record in keeps what they point at alive.
"""

from __future__ import annotations

import ctypes

from slipstream.kernels.cpu.packed_matrix import Matrix

# Activations by the names of Hugging Face's configurations.
ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu": 2,
    "relu": 3,
}


class KvPages(ctypes.Structure):
    """One group's pages; strides count elements."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("page_stride", ctypes.c_int64),
        ("value_offset", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("block_tokens", ctypes.c_int32),
        ("element_bytes", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class GroupStep(ctypes.Structure):
    """One cache group in one step."""

    _fields_ = (
        ("pages", KvPages),
        ("slots", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
    )


class Step(ctypes.Structure):
    """One step: what all its layers share."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("positions", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("max_seq_len", ctypes.c_int64),
    )


class Block(ctypes.Structure):
    """One layer. A pointer to what a family does not have is None."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        *((name, ctypes.c_int32) for name in ("group", "window", "activation")),
        *((name, ctypes.c_int32) for name in ("is_gated", "is_parallel", "is_layer_norm", "is_interleaved")),
        *((name, ctypes.c_float) for name in ("norm_eps", "scale", "softcap", "reserved")),
        ("place_offset", ctypes.c_int64),
        *((name, Matrix) for name in ("q", "k", "v", "output", "gate", "up", "down")),
        *((f"{name}_bias", ctypes.c_void_p) for name in ("q", "k", "v", "output", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "input_norm_bias", "q_norm", "k_norm")),
        *((name, ctypes.c_void_p) for name in ("post_attention_norm", "mlp_norm", "post_mlp_norm")),
        ("rotary_table", ctypes.c_void_p),
    )


class Decoder(ctypes.Structure):
    """A decoder around its blocks: look-up, final norm, head."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("embedding", Matrix),
        ("head", Matrix),
        *((name, ctypes.c_void_p) for name in ("norm", "norm_bias", "head_bias")),
        ("embedding_scale", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
        ("is_layer_norm", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class RowTables(ctypes.Structure):
    """What an engine keeps of its rows; strides count elements."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "lengths", "block_table")),
        *((name, ctypes.c_int64) for name in ("token_stride", "group_stride", "row_stride")),
        *((name, ctypes.c_int64) for name in ("block_tokens", "num_groups")),
    )


class DecodeStep(ctypes.Structure):
    """A step in which every row runs one token."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("decoder", "tables", "groups", "rows", "starts")),
        *((name, ctypes.c_int64) for name in ("num_rows", "max_seq_len")),
        *((name, ctypes.c_void_p) for name in ("logits", "drawn")),
    )
