"""Do the shards of a whole block add up, and does an MLP refuse what it does not know?"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slipstream.core.errors import ConfigError
from slipstream.layers.attention import SelfAttention
from slipstream.layers.build_context import BuildContext
from slipstream.layers.decoder_block import BlockSpec, DecoderBlock
from slipstream.layers.mlp import ACTIVATIONS, GatedMLP
from slipstream.layers.norm import RMSNorm
from slipstream.layers.rope_config import RopeConfig
from slipstream.layers.rotary import Rotary
from tests.layers.shards import contexts, draw, fill

SPEC = BlockSpec(
    hidden_size=12,
    intermediate_size=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    norm_eps=1e-6,
    attention_scale=0.4,
)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_shards_sum_to_the_formula(activation: str) -> None:
    x, total = draw(5, 12), torch.zeros(5, 12)
    gate, up, down = draw(20, 12, seed=1), draw(20, 12, seed=2), draw(12, 20, seed=3)
    for context in contexts():
        mlp = GatedMLP(context, 12, 20, activation=activation)
        fill(mlp.gate_up.weight, gate, "gate")
        fill(mlp.gate_up.weight, up, "up")
        fill(mlp.down.weight, down)
        total += mlp(x)
    name = {"swish": "silu"}.get(activation, activation.removesuffix("_pytorch_tanh"))
    kind = {"approximate": "tanh"} if activation.endswith("tanh") else {}
    expected = (getattr(torch.nn.functional, name)(x @ gate.T, **kind) * (x @ up.T)) @ down.T
    # Sums of 20 and 12 products in another order: a few float32 roundings of values up to about 100.
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown activation 'relu'; valid: silu"):
        GatedMLP(BuildContext(), 12, 20, activation="relu")


def test_optional_parts_exist_only_where_asked_for() -> None:
    rotary = Rotary(BuildContext(), RopeConfig(theta=1e4), head_dim=6)
    plain = DecoderBlock(BuildContext(), SPEC, layer_idx=0, rotary=rotary)
    names = {name for name, _ in plain.named_parameters()}
    assert names == {
        "input_norm.weight",
        "attention.qkv.weight",
        "attention.output.weight",
        "mlp_norm.weight",
        "mlp.gate_up.weight",
        "mlp.down.weight",
    }
    spec = dataclasses.replace(
        SPEC,
        has_qk_norms=True,
        has_post_norms=True,
        has_qkv_bias=True,
        has_output_bias=True,
        has_mlp_bias=True,
    )
    block = DecoderBlock(BuildContext(), spec, layer_idx=0, rotary=rotary)
    full = {name for name, _ in block.named_parameters()}
    assert full - names == {
        "attention.q_norm.weight",
        "attention.k_norm.weight",
        "post_attention_norm.weight",
        "post_mlp_norm.weight",
        "attention.qkv.bias",
        "attention.output.bias",
        "mlp.gate_up.bias",
        "mlp.down.bias",
    }


def test_attention_spec_is_of_this_rank() -> None:
    context = contexts()[1]
    rotary = Rotary(context, RopeConfig(theta=1e4), head_dim=6)
    spec = dataclasses.replace(SPEC, window=9, softcap=5.0)
    block = DecoderBlock(context, spec, layer_idx=3, rotary=rotary)
    spec = block.attention.attention.spec
    assert (spec.layer_idx, spec.num_kv_heads, spec.window, spec.softcap) == (3, 1, 9, 5.0)
    assert (spec.scale, spec.head_dim) == (0.4, 6)


def test_plain_self_attention_scales_by_its_head_size() -> None:
    rotary = Rotary(BuildContext(), RopeConfig(theta=1e4), head_dim=16)
    attention = SelfAttention.create(
        BuildContext(), 32, num_heads=2, num_kv_heads=1, head_dim=16, layer_idx=2, rotary_embedding=rotary
    )
    assert (attention.attention.spec.scale, attention.attention.spec.layer_idx) == (0.25, 2)


def test_norm_weight_is_float32_in_any_model() -> None:
    norm = RMSNorm(BuildContext(dtype=torch.bfloat16), 8, 1e-6)
    assert norm.weight.dtype == torch.float32
