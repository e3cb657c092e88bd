"""Does a chain of fused blocks compute what the composed ones do, whoever prepares the norms between them?

The definitions of the fused ops run here; attention is a stand-in, since it is the same in both.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.layers import fused_block
from slipstream.layers.attention import SelfAttention
from slipstream.layers.build_context import BuildContext
from slipstream.layers.decoder_block import BlockSpec, DecoderBlock
from slipstream.layers.fused_block import PREPARED, link, run_fused
from slipstream.layers.rope_config import RopeConfig
from slipstream.layers.rotary import Rotary

SPEC = BlockSpec(
    hidden_size=16,
    intermediate_size=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    norm_eps=1e-6,
    attention_scale=0.5,
    has_qkv_bias=True,
    has_mlp_bias=True,
)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[DecoderBlock]:
    monkeypatch.setattr(SelfAttention, "attend", lambda self, qkv_TC, batch: qkv_TC[:, :16].tanh())
    rotary = Rotary(BuildContext(), RopeConfig(theta=1e4), head_dim=4)
    made = [DecoderBlock(BuildContext(), SPEC, layer_idx=i, rotary=rotary) for i in range(3)]
    generator = torch.Generator().manual_seed(0)
    for block in made:
        for weight in block.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    link(made)
    return made


def a_step() -> Any:
    return SimpleNamespace(attention_plan=SimpleNamespace(step_cache={}))


def fused(blocks: list[DecoderBlock], x_TD: Tensor, batch: Any) -> Tensor:
    for block in blocks:
        assert block.fusible is not None
        x_TD = run_fused(block.fusible, x_TD, batch, block.next_norm)
    return x_TD


def composed(blocks: list[DecoderBlock], x_TD: Tensor) -> Tensor:
    for block in blocks:
        x_TD = block(x_TD, a_step())
    return x_TD


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_the_chain_is_the_composition(blocks: list[DecoderBlock], tokens: int) -> None:
    x, batch = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1)), a_step()
    # Two orders of float32 sums over 20 products.
    torch.testing.assert_close(fused(blocks, x, batch), composed(blocks, x), rtol=1e-4, atol=1e-5)
    assert PREPARED not in batch.attention_plan.step_cache


def test_what_was_prepared_is_used_for_its_own_sum_alone(blocks: list[DecoderBlock]) -> None:
    """A hook between layers may put another tensor in the place of a block's output."""
    x, batch = torch.randn(5, 16, generator=torch.Generator().manual_seed(2)), a_step()
    first = fused(blocks[:1], x, batch)
    assert batch.attention_plan.step_cache[PREPARED][0] is first
    other = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    expected = composed(blocks[1:], other)
    torch.testing.assert_close(fused(blocks[1:], other, batch), expected, rtol=1e-4, atol=1e-5)


def test_a_linked_norm_stays_a_parameter_of_its_own_block(blocks: list[DecoderBlock]) -> None:
    assert [len(block.next_norm) for block in blocks] == [1, 1, 0]
    assert blocks[0].next_norm[0] is blocks[1].input_norm
    assert {name.split(".")[0] for name, _ in blocks[0].named_parameters()} == {
        "input_norm",
        "attention",
        "mlp_norm",
        "mlp",
    }


def test_blocks_that_are_not_fused_are_not_linked() -> None:
    rotary = Rotary(BuildContext(), RopeConfig(theta=1e4), head_dim=4)
    sandwich = dataclasses.replace(SPEC, has_post_norms=True)
    made = [DecoderBlock(BuildContext(), spec, layer_idx=0, rotary=rotary) for spec in (SPEC, sandwich, SPEC)]
    link(made)
    assert [block.next_norm for block in made] == [(), (), ()]


def test_outside_kernels_keep_their_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody registered a kernel for a norm, steps of several tokens call the norm."""
    capability = SimpleNamespace(rotates=True)
    batch: Any = SimpleNamespace(
        attention_plan=SimpleNamespace(backend=SimpleNamespace(capability=capability))
    )

    class Four(SimpleNamespace):
        def __len__(self) -> int:
            return 4

    x = Four(is_cuda=True, dtype=torch.bfloat16)
    assert fused_block.suits(x, batch)  # type: ignore[arg-type]
    monkeypatch.setattr(fused_block.KERNELS, "on_gpu", frozenset({"rms_norm"}))
    assert not fused_block.suits(x, batch)  # type: ignore[arg-type]
