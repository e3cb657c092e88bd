"""Is every wrong field of a configuration refused by its name, in every family and both formats?"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from slipstream.checkpoint.opening import open_checkpoint
from slipstream.core.errors import CheckpointError
from slipstream.models.registry import ARCHITECTURES, GGUF_NAMES
from tests.models.families import FAMILIES
from tests.models.gguf_twins import write_gguf

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
LLAMA_LIKE = (*SIZES, "rms_norm_eps", "hidden_act")
REQUIRED: dict[str, tuple[str, ...]] = {
    "LlamaForCausalLM": LLAMA_LIKE,
    "MistralForCausalLM": LLAMA_LIKE,
    "Qwen2ForCausalLM": LLAMA_LIKE,
    "Qwen3ForCausalLM": (*LLAMA_LIKE, "head_dim"),
    "Gemma3ForCausalLM": (*SIZES, "rms_norm_eps", "hidden_activation", "sliding_window"),
    "GPTJForCausalLM": (
        *("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "rotary_dim"),
        *("layer_norm_epsilon", "activation_function"),
    ),
}
KV_HEADS = ("num_key_value_heads", "head_dim")
OPTIONAL: dict[str, tuple[str, ...]] = {
    "LlamaForCausalLM": (*KV_HEADS, "attention_bias", "mlp_bias", "tie_word_embeddings"),
    "MistralForCausalLM": (*KV_HEADS, "sliding_window", "tie_word_embeddings"),
    "Qwen2ForCausalLM": (*KV_HEADS, "use_sliding_window", "layer_types", "tie_word_embeddings"),
    "Qwen3ForCausalLM": ("num_key_value_heads", "use_sliding_window", "attention_bias"),
    "Gemma3ForCausalLM": (*KV_HEADS, "query_pre_attn_scalar", "attention_bias", "tie_word_embeddings"),
    "GPTJForCausalLM": ("n_inner", "tie_word_embeddings"),
}
BAD_VALUES = (0, -1, 1 << 40, "64", float("nan"), [1], {"a": 1})
CASES = [(family, field) for family in FAMILIES for field in REQUIRED[family] + OPTIONAL[family]]


@functools.cache
def twin_of(family: str) -> Any:
    return FAMILIES[family]()


def config_of(family: str) -> dict[str, Any]:
    return twin_of(family).config.to_dict()


def read(family: str, config: dict[str, Any]) -> Any:
    return ARCHITECTURES.get(family).Config.from_hf(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_untouched_configuration_is_read(family: str) -> None:
    assert read(family, config_of(family)).vocab_size == 128


@pytest.mark.parametrize(("family", "field"), CASES)
def test_a_bad_value_is_refused_by_its_field(family: str, field: str) -> None:
    for value in BAD_VALUES:
        with pytest.raises(CheckpointError, match=field):
            read(family, config_of(family) | {field: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_field_is_named(family: str) -> None:
    for field in REQUIRED[family]:
        config = config_of(family)
        del config[field]
        with pytest.raises(CheckpointError, match=field):
            read(family, config)
        with pytest.raises(CheckpointError, match=field):
            read(family, config_of(family) | {field: None})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_quantisation_is_refused(family: str) -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config.*made_up"):
        read(family, config_of(family) | {"quantization_config": {"quant_method": "made_up"}})


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("MistralForCausalLM", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("Qwen2ForCausalLM", {"head_dim": 15}, "head_dim is 15"),
        ("Qwen2ForCausalLM", {"hidden_size": 66}, "num_attention_heads"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": None}, "sliding_window"),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "layer_types": None, "max_window_layers": None},
            "max_window_layers",
        ),
        (
            "Qwen3ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked_attention"] * 3},
            "chunked_attention",
        ),
        ("Qwen3ForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("GPTJForCausalLM", {"rotary_dim": 7}, "rotary_dim.*even"),
        ("GPTJForCausalLM", {"rotary_dim": 18}, "rotary_dim"),
        ("GPTJForCausalLM", {"n_embd": 66}, "n_head"),
        ("GPTJForCausalLM", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("GPTJForCausalLM", {"activation_function": "gelu_neu"}, "Did you mean 'gelu_new'"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_fields_that_do_not_fit_are_refused(family: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        read(family, config_of(family) | changes)


def test_mistral_must_say_whether_it_has_a_window() -> None:
    config = config_of("MistralForCausalLM")
    del config["sliding_window"]
    with pytest.raises(CheckpointError, match=r"sliding_window.*null for a model without a window"):
        read("MistralForCausalLM", config)


@pytest.mark.parametrize("architecture", GGUF_NAMES)
def test_gguf_fields_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    family = GGUF_NAMES[architecture]
    checkpoint = open_checkpoint(write_gguf(twin_of(family), tmp_path / "model.gguf"))
    metadata, names = dict(checkpoint.config), checkpoint.tensor_names()
    checkpoint.close()
    read_gguf = ARCHITECTURES.get(family).Config.from_gguf
    assert read_gguf(metadata, names).vocab_size == 128
    # All that a family reads as a number; what it needs besides is refused when it is missing, too.
    fields = [key for key in metadata if key.startswith(f"{architecture}.")]
    assert len(fields) >= 9
    for field in fields:
        for value in (0, "8", float("nan"), 1 << 50, [2, 2]):
            with pytest.raises(CheckpointError, match=field):
                read_gguf(metadata | {field: value}, names)
    needed = ("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size")
    for field in (*(f"{architecture}.{name}" for name in needed), f"{architecture}.attention.head_count"):
        with pytest.raises(CheckpointError, match=field):
            read_gguf({key: value for key, value in metadata.items() if key != field}, names)
