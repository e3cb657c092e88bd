"""Are rotary frequencies transformers' own, in every kind, and does the table grow with the sequence?"""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slipstream.core.errors import ConfigError
from slipstream.layers.build_context import BuildContext
from slipstream.layers.rope_config import RopeConfig, rope_from_hf
from slipstream.layers.rotary import FIRST_POSITIONS, Rotary, inverse_frequencies
from tests.layers.shards import fill

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def batch(positions: list[int], max_seq_len: int) -> Any:
    plan = types.SimpleNamespace(max_seq_len=max_seq_len)
    return types.SimpleNamespace(positions_kT=torch.tensor([positions]), attention_plan=plan)


@pytest.mark.parametrize(
    ("parameters", "config"),
    [
        (
            {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
            RopeConfig(theta=10_000.0, kind="linear", factor=4.0),
        ),
        (LLAMA3, RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_positions=8192)),
    ],
    ids=["linear", "llama3"],
)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_frequencies_match(parameters: dict[str, Any], config: RopeConfig, head_dim: int) -> None:
    twin = LlamaConfig(head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=131_072)
    expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](twin, torch.device("cpu"))
    assert scale == 1.0
    torch.testing.assert_close(inverse_frequencies(config, head_dim), expected, rtol=1e-6, atol=0)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32_768,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"truncate": False},
        {"beta_fast": 16.0, "beta_slow": 4.0},
        {"mscale": 0.7, "mscale_all_dim": 0.9},
        {"attention_factor": 1.5},
        # So short that the ramp starts before the first frequency, and so low a base that it ends behind the
        # last.
        {"original_max_position_embeddings": 64, "rope_theta": 10.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_yarn_matches(changes: dict[str, Any], head_dim: int) -> None:
    parameters = YARN | changes
    twin = LlamaConfig(head_dim=head_dim, rope_parameters=dict(parameters), max_position_embeddings=131_072)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](twin, torch.device("cpu"))
    config = rope_from_hf({"rope_parameters": parameters}, max_positions=131_072, default_theta=1e4)
    torch.testing.assert_close(inverse_frequencies(config, head_dim), expected, rtol=1e-6, atol=0)
    assert config.attention_factor == pytest.approx(factor)
    table = Rotary(BuildContext(), config, head_dim=head_dim)(batch([0, 5], 6))
    angles = 5 * expected
    torch.testing.assert_close(table[1, 0], torch.cat((angles.cos(), angles.cos())) * factor)
    torch.testing.assert_close(table[1, 1], torch.cat((-angles.sin(), angles.sin())) * factor)


def test_the_rest_of_a_head_does_not_turn() -> None:
    config = RopeConfig(theta=100.0, rotary_dim=4)
    table = Rotary(BuildContext(), config, head_dim=10, interleaved=True)(batch([3], 4))
    whole = Rotary(BuildContext(), RopeConfig(theta=100.0), head_dim=4, interleaved=True)(batch([3], 4))
    assert torch.equal(table[..., :4], whole)
    assert torch.equal(table[0, :, 4:], torch.tensor([[1.0] * 6, [0.0] * 6]))
    with pytest.raises(ConfigError, match="rotary_dim is 4 of a head of 10"):
        Rotary(BuildContext(), config, head_dim=10)


def test_table_holds_each_positions_angles() -> None:
    rotary = Rotary(BuildContext(), RopeConfig(theta=100.0), head_dim=4)
    table = rotary(batch([0, 3], 4))
    expected = torch.tensor([math.cos(3.0), math.cos(0.3), math.cos(3.0), math.cos(0.3)])
    torch.testing.assert_close(table[1, 0], expected)
    expected = torch.tensor([-math.sin(3.0), -math.sin(0.3), math.sin(3.0), math.sin(0.3)])
    torch.testing.assert_close(table[1, 1], expected)
    assert torch.equal(table[0], torch.tensor([[1.0] * 4, [0.0] * 4]))


def test_table_grows_by_doubling_and_keeps_its_values() -> None:
    rotary = Rotary(BuildContext(), RopeConfig(theta=100.0), head_dim=4)
    before = rotary(batch([5], 6))
    assert rotary._table_P2H is not None and rotary._table_P2H.shape[0] == FIRST_POSITIONS
    longest = FIRST_POSITIONS + 1
    after = rotary(batch([5, longest - 1], longest))
    assert rotary._table_P2H.shape[0] == 2 * FIRST_POSITIONS
    assert torch.equal(after[:1], before)


def test_factors_divide_the_frequencies() -> None:
    plain = Rotary(BuildContext(), RopeConfig(theta=100.0), head_dim=4)
    divided = Rotary(BuildContext(), RopeConfig(theta=100.0, has_factors=True), head_dim=4)
    assert divided.factors is not None
    fill(divided.factors, torch.tensor([2.0, 1.0]))
    assert torch.allclose(divided(batch([6], 7))[0, :, 0], plain(batch([3], 7))[0, :, 0])
    assert torch.allclose(divided(batch([6], 7))[0, :, 1], plain(batch([6], 7))[0, :, 1])
