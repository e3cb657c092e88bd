"""Is every spelling of a rotary embedding read, and every unsupported one refused by name?"""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.core.errors import CheckpointError
from slipstream.layers.rope_config import RopeConfig, rope_from_gguf, rope_from_hf

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(config: dict[str, Any], **options: Any) -> RopeConfig:
    return rope_from_hf(config, max_positions=4096, default_theta=10_000.0, **options)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, RopeConfig(theta=10_000.0)),
        ({"rope_theta": 500_000}, RopeConfig(theta=500_000.0)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            RopeConfig(theta=5e5, kind="linear", factor=2.0),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, RopeConfig(theta=1e6)),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
            RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_positions=4096),
        ),
    ],
)
def test_spellings_of_hugging_face(config: dict[str, Any], expected: RopeConfig) -> None:
    assert read(config) == expected


@pytest.mark.parametrize(
    ("scaling", "match"),
    [
        (
            {"rope_type": "longrope", "factor": 2.0},
            "'longrope' are not supported; supported: default, linear, llama3, yarn",
        ),
        ({"rope_type": "yarn"}, "'factor' is missing"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast is 1.0"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}, "attention_factor"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope_theta is 1.0; yarn"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate"),
        ({"type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"rope_type": "lama3"}, "Did you mean 'llama3'"),
        ({"rope_type": "linear"}, "'factor' is missing"),
        ({"rope_type": "linear", "factor": 0.5}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        (LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 1.0}, "high_freq_factor is 1.0"),
        (LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 0}, "original_max"),
        ({"rope_type": 3}, "rope_type"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_what_is_not_supported_is_named(key: str, scaling: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        read({key: scaling})


@pytest.mark.parametrize("theta", [0, -1.0, float("nan"), float("inf"), "1e4", True])
def test_a_bad_base_is_refused(theta: Any) -> None:
    with pytest.raises(CheckpointError, match="rope_theta"):
        read({"rope_theta": theta})
    with pytest.raises(CheckpointError, match="rope_theta"):
        read({"rope_parameters": {"rope_theta": theta}})


def test_layer_types_have_their_own() -> None:
    config = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": None}}
    assert read(config, layer_type="full_attention").theta == 1e6
    assert read(config, layer_type="sliding_attention").theta == 10_000.0
    with pytest.raises(CheckpointError, match="made_up"):
        read({"rope_parameters": {"made_up": {}}}, layer_type="full_attention")


def test_yarn_has_the_reach_and_the_attention_factor_of_its_scaling() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    plain = read({"rope_scaling": yarn})
    assert (plain.original_positions, plain.reach) == (4096, 16_384)
    # Section 3.4 of the paper: 0.1 ln(s) + 1.
    assert plain.attention_factor == pytest.approx(1.1386294)
    assert read({"rope_scaling": yarn | {"attention_factor": 0.5}}).attention_factor == 0.5
    ratio = read({"rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}})
    assert ratio.attention_factor == 1.0
    assert read({"rope_scaling": LLAMA3 | {"rope_type": "llama3"}}).reach == 0


def read_gguf(metadata: dict[str, Any], **options: Any) -> RopeConfig:
    return rope_from_gguf(metadata, "x", head_dim=64, max_positions=512, default_theta=1e4, **options)


def test_gguf_keys() -> None:
    metadata = {"x.rope.freq_base": 1e5, "x.rope.scaling.type": "linear", "x.rope.scaling.factor": 8.0}
    assert read_gguf(metadata) == RopeConfig(theta=1e5, kind="linear", factor=8.0)
    assert read_gguf({}, has_factors=True).has_factors
    with pytest.raises(CheckpointError, match=r"x\.rope\.scaling\.factor"):
        read_gguf(metadata | {"x.rope.scaling.factor": None})


def test_gguf_yarn_reads_as_that_of_hugging_face() -> None:
    metadata = {
        "x.rope.scaling.type": "yarn",
        "x.rope.scaling.factor": 4.0,
        "x.rope.scaling.original_context_length": 128,
    }
    values = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert read_gguf(metadata) == read({"rope_parameters": values})
    with pytest.raises(CheckpointError, match=r"yarn_beta_fast is set"):
        read_gguf(metadata | {"x.rope.scaling.yarn_beta_fast": 16.0})


def test_gguf_turns_a_part_of_the_head_only_where_the_family_does() -> None:
    assert read_gguf({"x.rope.dimension_count": 16}, is_partial=True).rotary_dim == 16
    assert read_gguf({"x.rope.dimension_count": 64}, is_partial=True).rotary_dim == 0
    for value, options in ((16, {}), (15, {"is_partial": True}), (65, {"is_partial": True}), (0, {})):
        with pytest.raises(CheckpointError, match="dimension_count"):
            read_gguf({"x.rope.dimension_count": value}, **options)
    part = {"x.rope.dimension_count": 16, "x.rope.scaling.type": "linear", "x.rope.scaling.factor": 2.0}
    with pytest.raises(CheckpointError, match=r"scaling\.type"):
        read_gguf(part, is_partial=True)
