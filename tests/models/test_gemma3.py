"""Does our Gemma 3 say what transformers' says, from either format, with blocks leaving the window?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.core.errors import CheckpointError
from slipstream.models.gemma3 import Gemma3, Gemma3Config
from slipstream.parallel.mesh import Mesh
from slipstream.quant.unquantized import Unquantized
from tests.models.harness import PagedRunner
from tests.models.parity import (
    assert_same_greedy,
    assert_same_logits,
    prompt_of,
    relative_error,
    separated_greedy,
)
from tests.models.twins import hf_logits, load, make_gemma3, save


@pytest.fixture(scope="module")
def twin() -> Any:
    return make_gemma3()


@pytest.fixture(scope="module")
def folder(twin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(twin, tmp_path_factory.mktemp("gemma3"))


@pytest.fixture
def hf_config(twin: Any) -> dict[str, Any]:
    return twin.config.to_dict()


@pytest.fixture(scope="module")
def greedy(twin: Any) -> list[int]:
    return separated_greedy(twin)


def test_blocks_go_stale_while_the_output_matches(greedy: list[int], folder: Path) -> None:
    runner = assert_same_greedy(load(folder), greedy, chunk=7)
    # 37 + 64 and 5 + 64 positions, a window of 8 and blocks of 4: all but a few blocks were dropped.
    assert runner.num_stale > 30


def test_a_wrong_window_is_seen(twin: Any, folder: Path, hf_config: dict[str, Any]) -> None:
    config = Gemma3Config.from_hf(hf_config | {"sliding_window": 9})
    ours = load(folder)
    wrong = Gemma3(config, mesh=Mesh(), quant=Unquantized(), dtype=torch.float32, device="cpu")
    wrong.load_state_dict(ours.state_dict())
    with pytest.raises(AssertionError):
        assert_same_logits(wrong, twin, chunk=7)


def test_older_spelling_of_the_configuration_reads_the_same(hf_config: dict[str, Any]) -> None:
    older = dict(hf_config)
    del older["rope_parameters"], older["layer_types"]
    older |= {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": None,
        "sliding_window_pattern": 6,
    }
    assert Gemma3Config.from_hf(older) == Gemma3Config.from_hf(hf_config)
    scaled = Gemma3Config.from_hf(older | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert (scaled.rope.factor, scaled.local_rope.factor) == (8.0, 1.0)


def test_bfloat16_scales_the_embedding_as_the_model_was_trained(twin: Any, folder: Path) -> None:
    prompt = prompt_of(20)
    ours = load(folder, dtype=torch.bfloat16)
    given = PagedRunner(ours, kv_dtype=torch.bfloat16).logits(prompt, chunk=7)
    # bfloat16 keeps 8 bits: 0.4% a step, several percent over 7 layers of raised norms.
    assert relative_error(given, hf_logits(twin, prompt)) < 0.2
    odd = Gemma3Config.from_hf(twin.config.to_dict() | {"hidden_size": 2304})
    model = Gemma3(odd, mesh=Mesh(), quant=Unquantized(), dtype=torch.bfloat16, device="meta")
    assert model.embedding.scale == 48.0
    odd = Gemma3Config.from_hf(twin.config.to_dict() | {"hidden_size": 1152})
    model = Gemma3(odd, mesh=Mesh(), quant=Unquantized(), dtype=torch.bfloat16, device="meta")
    # sqrt(1152) = 33.94 lies between the bfloat16 values 33.75 and 34.
    assert model.embedding.scale == 34.0


def test_groups_follow_the_pattern_of_layers(folder: Path) -> None:
    local, rest = load(folder).cache_groups()
    assert (local.kind, local.window, local.layers) == ("window", 8, (0, 1, 2, 3, 4, 6))
    assert (rest.kind, rest.window, rest.layers) == ("full", 0, (5,))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": None}, "sliding_window"),
        ({"query_pre_attn_scalar": None}, "query_pre_attn_scalar"),
        ({"query_pre_attn_scalar": float("nan")}, "query_pre_attn_scalar"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 7}, "chunked_attention"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "relu"}, "hidden_activation"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters holds"),
        ({"quantization_config": {"quant_method": "made_up"}}, "made_up"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_wrong_fields_are_refused_by_name(
    hf_config: dict[str, Any], changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        Gemma3Config.from_hf(hf_config | changes)


def gguf_metadata() -> dict[str, Any]:
    return {
        "gemma3.context_length": 512,
        "gemma3.embedding_length": 5376,
        "gemma3.block_count": 62,
        "gemma3.feed_forward_length": 96,
        "gemma3.attention.head_count": 32,
        "gemma3.attention.head_count_kv": 16,
        "gemma3.attention.key_length": 128,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.attention.sliding_window": 1024,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
        "gemma3.vocab_size": 64,
    }


def test_gguf_facts_that_have_no_key() -> None:
    config = Gemma3Config.from_gguf(gguf_metadata())
    assert config.attention_scale == 168**-0.5
    smaller = Gemma3Config.from_gguf(gguf_metadata() | {"gemma3.block_count": 34})
    assert smaller.attention_scale == 128**-0.5
    assert (config.local_rope.theta, config.local_rope.kind) == (10_000.0, "default")
    assert (config.rope.theta, config.rope.factor) == (1_000_000.0, 8.0)
    assert [i for i, is_local in enumerate(config.is_local) if not is_local] == list(range(5, 62, 6))


def test_gguf_window_is_required() -> None:
    with pytest.raises(CheckpointError, match=r"gemma3\.attention\.sliding_window"):
        Gemma3Config.from_gguf(gguf_metadata() | {"gemma3.attention.sliding_window": None})


def test_untied_head_of_gguf_is_used() -> None:
    config = Gemma3Config.from_gguf(gguf_metadata() | {"gemma3.block_count": 1}, ["output.weight"])
    model = Gemma3(config, mesh=Mesh(), quant=Unquantized(), dtype=torch.float32, device="meta")
    assert model.weight_map("gguf")["output.weight"].parameter is model.head.weight
    assert model.head.weight is not model.embedding.weight
