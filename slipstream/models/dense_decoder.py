"""What do the decoders of most families share? Embedding, blocks over paged attention, final norm, head.

A family states what differs: how its configuration is read, what its tensors are called and, where its block
is not the standard one, `make_layer`.
T tokens, R sampled rows, D hidden, V vocabulary.
Invariant: a configuration is complete and checked before a tensor is allocated; the options it holds are
honoured by every family that sets them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slipstream.checkpoint.base import Format
from slipstream.core.batch import ForwardBatch
from slipstream.core.cache_group import CacheGroup
from slipstream.layers.build_context import BuildContext
from slipstream.layers.decoder_block import BlockSpec, DecoderBlock
from slipstream.layers.embedding import LMHead, VocabEmbedding
from slipstream.layers.fused_block import link
from slipstream.layers.linear import local_kv_heads
from slipstream.layers.native_block import BlockList
from slipstream.layers.native_decoder import NativeDecoder, find_native_decoder
from slipstream.layers.norm import RMSNorm
from slipstream.layers.rope_config import RopeConfig
from slipstream.layers.rotary import Rotary
from slipstream.models.base import run_layers
from slipstream.models.weight_map import (
    ATTENTION_ROWS,
    MLP_ROWS,
    PRE_NORM_ROWS,
    Place,
    Row,
    RowTransform,
    block_places,
    ignore,
    module_places,
)
from slipstream.parallel.mesh import Mesh
from slipstream.quant.base import QuantMethod


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Sizes of a whole model and the options of its blocks; a family's subclass reads them.

    Layer i sees only `window` positions where `is_local[i]`; without `is_local` every layer sees all. Local
    layers turn by `local_rope` where there is one. Without `attention_scale` it is 1 / sqrt(head_dim).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeConfig
    local_rope: RopeConfig | None = None
    activation: str = "silu"
    attention_scale: float | None = None
    window: int = 0
    is_local: tuple[bool, ...] = ()
    is_tied: bool = False
    final_softcap: float = 0.0
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_head_bias: bool = False
    has_qk_norms: bool = False
    has_post_norms: bool = False

    def window_of(self, layer_idx: int) -> int:
        """Return the positions that a query of this layer sees, 0 for all."""
        return self.window if self.is_local and self.is_local[layer_idx] else 0

    def block_spec(self, layer_idx: int) -> BlockSpec:
        scale = self.attention_scale
        return BlockSpec(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm_eps=self.norm_eps,
            attention_scale=self.head_dim**-0.5 if scale is None else scale,
            activation=self.activation,
            window=self.window_of(layer_idx),
            has_qkv_bias=self.has_qkv_bias,
            has_output_bias=self.has_output_bias,
            has_mlp_bias=self.has_mlp_bias,
            has_qk_norms=self.has_qk_norms,
            has_post_norms=self.has_post_norms,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class OuterNames:
    """What a checkpoint calls the modules around the blocks, and what stands in front of a block's number."""

    embedding: str
    norm: str
    head: str
    layers: str


class DenseDecoder(nn.Module):
    """A decoder whose every layer attends and then mixes.

    `rows` name a block's tensors; `buffers` and `layer_buffers` are tensors that Hugging Face files may hold
    and that follow from the configuration.
    """

    Config: ClassVar[type[Any]]
    rows: ClassVar[tuple[Row, ...]] = ATTENTION_ROWS + MLP_ROWS + PRE_NORM_ROWS
    outer_names: ClassVar[dict[Format, OuterNames]] = {
        "hf": OuterNames("model.embed_tokens", "model.norm", "lm_head", "model.layers."),
        "gguf": OuterNames("token_embd", "output_norm", "output", "blk."),
    }
    buffers_of_hf: ClassVar[tuple[str, ...]] = ("model.rotary_emb.inv_freq",)
    native_decoder: NativeDecoder | None = None
    layer_buffers_of_hf: ClassVar[tuple[str, ...]] = ("self_attn.rotary_emb.inv_freq",)

    def __init__(
        self,
        config: Any,
        *,
        mesh: Mesh,
        quant: QuantMethod,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.config = config
        build = BuildContext(mesh=mesh, quant=quant, dtype=dtype, device=device)
        self.kv_heads = local_kv_heads(config.num_kv_heads, mesh.tp_size)
        self.embedding = VocabEmbedding(
            build, config.vocab_size, config.hidden_size, scale=self.embedding_scale(dtype)
        )
        self.rotary = self.make_rotary(build, config.rope)
        self.local_rotary = self.make_rotary(build, config.local_rope) if config.local_rope else None
        self.layers = BlockList(self.make_layer(build, i) for i in range(config.num_layers))
        link(self.layers)
        self.norm = self.make_norm(build)
        tied = self.embedding if config.is_tied else None
        self.head = LMHead(build, config.vocab_size, config.hidden_size, tied=tied, bias=config.has_head_bias)

    def embedding_scale(self, dtype: torch.dtype) -> float:
        """Return what embedded tokens are multiplied by."""
        return 1.0

    def make_rotary(self, build: BuildContext, rope: RopeConfig) -> Rotary:
        return Rotary(build, rope, head_dim=self.config.head_dim)

    def make_layer(self, build: BuildContext, layer_idx: int) -> nn.Module:
        spec = self.config.block_spec(layer_idx)
        rotary = self.local_rotary if self.local_rotary is not None and spec.window else self.rotary
        return DecoderBlock(build, spec, layer_idx=layer_idx, rotary=rotary)

    def make_norm(self, build: BuildContext) -> nn.Module:
        return RMSNorm(build, self.config.hidden_size, self.config.norm_eps)

    def cache_groups(self) -> list[CacheGroup]:
        """Return the local layers as one "window" group and the others as one "full" group."""
        config = self.config
        sizes = {"heads": self.kv_heads, "head_dim": config.head_dim}
        local = tuple(i for i in range(config.num_layers) if config.window_of(i))
        rest = tuple(i for i in range(config.num_layers) if not config.window_of(i))
        groups: list[CacheGroup] = []
        if local:
            groups.append(CacheGroup(layers=local, kind="window", window=config.window, **sizes))
        if rest:
            groups.append(CacheGroup(layers=rest, kind="full", **sizes))
        return groups

    @property
    def num_native_steps(self) -> int:
        """Return how many steps ran their layers as native calls."""
        return min((stack.num_calls for stack in self.layers.stacks), default=0)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Return the [T, D] hidden states after the final norm."""
        x_TD = run_layers(self.layers, self.embedding(batch), batch)
        if self.native_decoder is not None and batch.attention_plan.backend.capability.native_blocks:
            return self.native_decoder.norm(x_TD)
        return self.norm(x_TD)

    def find_native(self) -> None:
        """Make the decoder's native form, where it has one; called once the layers have theirs."""
        if not self.config.final_softcap:
            self.native_decoder = find_native_decoder(self.layers, self.embedding, self.norm, self.head)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Return [R, V] float32, soft-capped where the configuration says so."""
        logits_RV = self.head(hidden_RD)
        cap = self.config.final_softcap
        return logits_RV.div_(cap).tanh_().mul_(cap) if cap else logits_RV

    def transforms(self, format: Format) -> dict[str, RowTransform]:
        """Return the changes of layout by a row's name, or the final norm's, in `format`."""
        return {}

    def weight_map(self, format: Format) -> dict[str, Place]:
        names, transforms = self.outer_names[format], self.transforms(format)
        places = module_places(self.embedding, names.embedding)
        places |= module_places(self.norm, names.norm, transform=transforms.get(names.norm))
        if not self.config.is_tied:
            places |= module_places(self.head, names.head)
        elif format == "hf":
            places[f"{names.head}.weight"] = ignore("tied to the embedding")
        if format == "gguf" and self.rotary.factors is not None:
            places["rope_freqs.weight"] = Place(self.rotary.factors)
        buffers = list(self.buffers_of_hf) if format == "hf" else []
        for i, block in enumerate(self.layers):
            prefix = f"{names.layers}{i}."
            places |= block_places(block, prefix, self.rows, format, transforms)
            if format == "hf":
                buffers += [prefix + name for name in self.layer_buffers_of_hf]
        return places | {name: ignore("derived from the configuration") for name in buffers}
