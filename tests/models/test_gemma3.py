"""Does our Gemma 3 say what transformers' says, from either format, with blocks leaving the window?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.core.errors import CheckpointError
from slipstream.layers.linear import Linear
from slipstream.models.gemma3 import Gemma3, Gemma3Config
from slipstream.parallel.mesh import Mesh
from slipstream.quant.unquantized import Unquantized
from tests.models.gguf_twins import write_gguf
from tests.models.harness import PagedRunner
from tests.models.parity import (
    CHUNKS,
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


@pytest.mark.parametrize("chunk", CHUNKS)
def test_output_matches_while_blocks_go_stale(twin: Any, greedy: list[int], folder: Path, chunk: int) -> None:
    ours = load(folder)
    assert_same_logits(ours, twin, chunk=chunk)
    runner = assert_same_greedy(ours, greedy, chunk=chunk)
    # 37 + 64 and 5 + 64 positions, a window of 8 and blocks of 4: all but a few blocks were dropped.
    assert runner.num_stale > 30


@pytest.mark.parametrize("part", ["input_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm"])
def test_one_changed_norm_is_seen(twin: Any, folder: Path, part: str) -> None:
    ours = load(folder)
    getattr(ours.layers[2], part).weight.data[7] += 0.5
    with pytest.raises(AssertionError):
        assert_same_logits(ours, twin, chunk=7)


def test_a_wrong_window_is_seen(twin: Any, folder: Path, hf_config: dict[str, Any]) -> None:
    config = Gemma3Config.from_hf(hf_config | {"sliding_window": 9})
    ours = load(folder)
    wrong = Gemma3(config, mesh=Mesh(), quant=Unquantized(), dtype=torch.float32, device="cpu")
    wrong.load_state_dict(ours.state_dict())
    with pytest.raises(AssertionError):
        assert_same_logits(wrong, twin, chunk=7)


def test_gguf_twin_matches(twin: Any, tmp_path: Path) -> None:
    # GGUF has no key for the score scale: converters rely on the head size, so the twin must use it too.
    plain = make_gemma3(query_pre_attn_scalar=32)
    assert_same_logits(load(write_gguf(plain, tmp_path / "gemma3.gguf")), plain, chunk=7)


@pytest.mark.parametrize(
    "changes",
    [
        {"final_logit_softcapping": 3.0},
        {"attention_bias": True},
        {"num_key_value_heads": 2, "hidden_activation": "silu"},
        {"layer_types": ["full_attention", "sliding_attention"] * 3, "num_hidden_layers": 6},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
    ],
    ids=["softcap", "bias", "silu", "layer-types", "rope"],
)
def test_variants_match(tmp_path: Path, changes: dict[str, Any]) -> None:
    twin = make_gemma3(**changes)
    assert_same_logits(load(save(twin, tmp_path / "model")), twin, chunk=7)


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


@pytest.mark.parametrize("num_rows", [1, 32])
def test_every_linear_runs_once_a_step(folder: Path, num_rows: int) -> None:
    ours = load(folder)
    counts: dict[str, int] = {}
    for name, module in ours.named_modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
    runner = PagedRunner(ours)
    runner.step([(runner.add(prompt_of(3, seed=i)), 3) for i in range(num_rows)])
    assert len(counts) == 4 * ours.config.num_layers
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("rank", [0, 1])
def test_two_tensor_ranks_hold_half_each(hf_config: dict[str, Any], rank: int) -> None:
    config = Gemma3Config.from_hf(hf_config | {"num_key_value_heads": 2})
    whole = parameter_bytes(config, Mesh())
    norms_per_layer = 4 * config.hidden_size + 2 * config.head_dim
    replicated = 4 * (config.num_layers * norms_per_layer + config.hidden_size)
    assert parameter_bytes(config, Mesh(tp_size=2, tp_rank=rank)) <= whole / 2 + replicated


def parameter_bytes(config: Gemma3Config, mesh: Mesh) -> int:
    model = Gemma3(config, mesh=mesh, quant=Unquantized(), dtype=torch.float32, device="cpu")
    return sum(p.numel() * p.element_size() for p in model.parameters())


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
