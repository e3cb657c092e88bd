"""Where does every tensor of a checkpoint go? Named places, written out by the model, guessed by nobody.

Invariant: a name is mapped as a whole; what a file may hold and the model does not need is a row too, with
the reason. Transforms turn a stored layout into ours a chunk of rows at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from slipstream.checkpoint.base import Format
from slipstream.layers.parameter import Parameter


@dataclasses.dataclass(frozen=True, slots=True)
class RowTransform:
    """A change of layout that works on any `multiple` of whole rows and keeps the shape."""

    apply: Callable[[Tensor], Tensor]
    multiple: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A parameter and the slot in it; with `parameter` None the tensor is ignored for `reason`."""

    parameter: Parameter | None
    slot: str = ""
    transform: RowTransform | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a block: its name after the block's prefix in each format, and whose it is.

    `module` is the attribute path in the block, `slot` the part of a fused parameter. A row covers
    every tensor of the module: its weight, and its bias where it has one.
    """

    hf: str
    gguf: str
    module: str
    slot: str = ""

    def stem(self, format: Format) -> str:
        return self.hf if format == "hf" else self.gguf


ATTENTION_ROWS = (
    Row("self_attn.q_proj", "attn_q", "attention.qkv", "q"),
    Row("self_attn.k_proj", "attn_k", "attention.qkv", "k"),
    Row("self_attn.v_proj", "attn_v", "attention.qkv", "v"),
    Row("self_attn.o_proj", "attn_output", "attention.output"),
)
MLP_ROWS = (
    Row("mlp.gate_proj", "ffn_gate", "mlp.gate_up", "gate"),
    Row("mlp.up_proj", "ffn_up", "mlp.gate_up", "up"),
    Row("mlp.down_proj", "ffn_down", "mlp.down"),
)
PRE_NORM_ROWS = (
    Row("input_layernorm", "attn_norm", "input_norm"),
    Row("post_attention_layernorm", "ffn_norm", "mlp_norm"),
)
QK_NORM_ROWS = (
    Row("self_attn.q_norm", "attn_q_norm", "attention.q_norm"),
    Row("self_attn.k_norm", "attn_k_norm", "attention.k_norm"),
)


def block_places(
    block: nn.Module,
    prefix: str,
    rows: Sequence[Row],
    format: Format,
    transforms: dict[str, RowTransform] | None = None,
) -> dict[str, Place]:
    """Return the places of one block; `transforms` is keyed by a row's name in `format`."""
    places: dict[str, Place] = {}
    for row in rows:
        stem = row.stem(format)
        places |= module_places(
            block.get_submodule(row.module),
            prefix + stem,
            slot=row.slot,
            transform=(transforms or {}).get(stem),
        )
    return places


def module_places(
    module: nn.Module, stem: str, *, slot: str = "", transform: RowTransform | None = None
) -> dict[str, Place]:
    """Return the places of a module's own tensors: its weight, and its bias where it has one."""
    places: dict[str, Place] = {}
    for name, parameter in module.named_parameters(recurse=False):
        assert isinstance(parameter, Parameter)
        places[f"{stem}.{name}"] = Place(parameter, slot, transform)
    return places


def ignore(reason: str) -> Place:
    return Place(None, reason=reason)


def split_pairs(head_dim: int) -> RowTransform:
    """Undo the order in which GGUF keeps rows of llama's q and k: rotary pairs (i, i + H/2) side by side."""

    def apply(rows: Tensor) -> Tensor:
        pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)

    return RowTransform(apply, head_dim)


ADD_ONE = RowTransform(lambda rows: rows.float() + 1.0)
