"""Does our Llama say what transformers' says, from either format, and refuse what it cannot run?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.core.errors import CheckpointError, ConfigError
from slipstream.models.llama import Llama, LlamaConfig
from slipstream.parallel.mesh import Mesh
from slipstream.quant.unquantized import Unquantized
from tests.models.gguf_twins import write_gguf
from tests.models.harness import PagedRunner
from tests.models.parity import (
    PROMPT_LEN,
    TOLERANCE,
    assert_same_logits,
    prompt_of,
    relative_error,
)
from tests.models.twins import hf_logits, load, make_llama, save


@pytest.fixture(scope="module")
def twin() -> Any:
    return make_llama()


@pytest.fixture(scope="module")
def folder(twin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(twin, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def hf_config(twin: Any) -> dict[str, Any]:
    return twin.config.to_dict()


def test_gguf_twin_matches(twin: Any, tmp_path: Path) -> None:
    ours = load(write_gguf(twin, tmp_path / "llama.gguf"))
    assert ours.rotary.factors is not None and not ours.config.is_tied
    assert_same_logits(ours, twin, chunk=7)


def test_rotary_factors_of_gguf_are_used(twin: Any, tmp_path: Path) -> None:
    ours = load(write_gguf(twin, tmp_path / "llama.gguf"))
    ours.rotary.factors.data.fill_(1.0)
    with pytest.raises(AssertionError):
        assert_same_logits(ours, twin, chunk=7)


def test_tied_quantized_gguf_matches_its_own_rounded_weights(tmp_path: Path) -> None:
    twin = make_llama(tie_word_embeddings=True, num_key_value_heads=2)
    ours = load(write_gguf(twin, tmp_path / "llama.gguf", quantize=True))
    assert ours.head.weight is ours.embedding.weight
    given = PagedRunner(ours).logits(prompt_of(20), chunk=7)
    error = relative_error(given, hf_logits(twin, prompt_of(20)))
    # Q8_0 keeps 8 bits of every weight: about 0.4% each, a few percent of the largest logit after 3 layers;
    # zero would mean that nothing was quantised.
    assert 1e-4 < error < 0.1


def test_a_row_does_not_depend_on_its_neighbours(folder: Path) -> None:
    ours = load(folder)
    prompts = [prompt_of(3 + 5 * i, seed=i) for i in range(6)]
    alone = [PagedRunner(ours).greedy([p], num_new=12, chunk=64)[0] for p in prompts]
    assert PagedRunner(ours).greedy(prompts, num_new=12, chunk=5) == alone


def test_cache_is_one_full_group(folder: Path) -> None:
    (group,) = load(folder).cache_groups()
    assert (group.kind, group.layers, group.heads, group.head_dim) == ("full", (0, 1, 2), 2, 16)


def test_more_ranks_than_kv_heads_hold_copies(hf_config: dict[str, Any]) -> None:
    config = LlamaConfig.from_hf(hf_config)
    models = [
        Llama(config, mesh=Mesh(tp_size=4, tp_rank=r), quant=Unquantized(), dtype=torch.float32, device="cpu")
        for r in range(4)
    ]
    starts = [model.layers[0].attention.qkv.weight.slots["k"].start for model in models]
    assert starts == [0, 0, 16, 16]
    assert models[0].cache_groups()[0].heads == 1


def test_heads_that_ranks_cannot_share_are_refused(hf_config: dict[str, Any]) -> None:
    config = LlamaConfig.from_hf(hf_config)
    with pytest.raises(ConfigError, match="2 key-value heads cannot be shared by 3 tensor ranks"):
        Llama(
            config,
            mesh=Mesh(tp_size=3),
            quant=Unquantized(),
            dtype=torch.float32,
            device="cpu",
        )


BAD_VALUES = [0, -1, 1 << 40, "64", float("nan"), True, [1]]
REQUIRED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
]


@pytest.mark.parametrize("field", REQUIRED)
def test_missing_field_is_named(hf_config: dict[str, Any], field: str) -> None:
    del hf_config[field]
    with pytest.raises(CheckpointError, match=field):
        LlamaConfig.from_hf(hf_config)


@pytest.mark.parametrize("value", BAD_VALUES, ids=repr)
@pytest.mark.parametrize(
    "field", [*REQUIRED[:6], "num_key_value_heads", "head_dim", "hidden_act", "quantization_config"]
)
def test_bad_value_is_refused_by_field(hf_config: dict[str, Any], field: str, value: Any) -> None:
    hf_config[field] = value
    with pytest.raises(CheckpointError, match=field):
        LlamaConfig.from_hf(hf_config)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1e-5", 2.0, False], ids=repr)
def test_bad_epsilon_is_refused(hf_config: dict[str, Any], value: Any) -> None:
    hf_config["rms_norm_eps"] = value
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        LlamaConfig.from_hf(hf_config)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": None, "hidden_size": 66}, "num_attention_heads"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"hidden_act": "silo"}, "Did you mean 'silu'"),
        ({"quantization_config": {"quant_method": "made_up"}}, "quantization_config.*made_up"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' are not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_fields_that_do_not_fit_are_refused(
    hf_config: dict[str, Any], changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        LlamaConfig.from_hf(hf_config | changes)


def gguf_metadata() -> dict[str, Any]:
    return {
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 3,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": ["a"] * 128,
    }


def test_gguf_vocabulary_falls_back_to_the_tokenizer() -> None:
    config = LlamaConfig.from_gguf(gguf_metadata(), ["output.weight"])
    assert (config.vocab_size, config.head_dim, config.rope.theta, config.is_tied) == (
        128,
        16,
        10_000.0,
        False,
    )


@pytest.mark.parametrize("field", list(gguf_metadata()))
def test_gguf_field_missing_or_wrong_is_named(field: str) -> None:
    named = "vocab_size" if "tokens" in field else field
    for value in (None, 0, "8", float("nan"), 1 << 50):
        if field.endswith("_kv") and value is None:
            continue
        with pytest.raises(CheckpointError, match=named):
            LlamaConfig.from_gguf(gguf_metadata() | {field: value})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' are not supported"),
        ({"llama.rope.dimension_count": 8}, "dimension_count is 8"),
        ({"llama.attention.value_length": 8}, "value_length is 8"),
        ({"llama.attention.head_count_kv": [2, 2, 2]}, "head_count_kv"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_gguf_variants_are_refused_by_name(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        LlamaConfig.from_gguf(gguf_metadata() | changes)


def test_tolerance_is_far_above_rounding(twin: Any, folder: Path) -> None:
    given = PagedRunner(load(folder)).logits(prompt_of(PROMPT_LEN), chunk=PROMPT_LEN)
    assert relative_error(given, hf_logits(twin, prompt_of(PROMPT_LEN))) < TOLERANCE / 10
