"""Does each family say what transformers' says, from either format, in every variant? One table for all.

What only one family has (windows that drop blocks, wrong fields of its configuration) is in its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.core.errors import CheckpointError
from slipstream.core.sampling_params import SamplingParams
from slipstream.layers.linear import Linear
from slipstream.llm import LLM
from slipstream.models.registry import ARCHITECTURES
from slipstream.parallel.mesh import Mesh
from slipstream.quant.unquantized import Unquantized
from tests.models.families import FAMILIES
from tests.models.gguf_twins import write_gguf
from tests.models.harness import PagedRunner
from tests.models.parity import (
    CHUNKS,
    NUM_NEW,
    PROMPT_LEN,
    assert_same_greedy,
    assert_same_logits,
    prompt_of,
    relative_error,
    separated_greedy,
)
from tests.models.twins import (
    hf_logits,
    load,
    make_gemma3,
    make_gptj,
    make_llama,
    make_mistral,
    make_qwen2,
    make_qwen3,
    save,
)

# GGUF has no key for Gemma's score scale: converters rely on the head size, so the twin must use it too.
OF_GGUF: dict[str, dict[str, Any]] = {"Gemma3ForCausalLM": {"query_pre_attn_scalar": 32}}
# Two key-value heads at least, for two ranks to share.
OF_TWO_RANKS: dict[str, dict[str, Any]] = {"Gemma3ForCausalLM": {"num_key_value_heads": 2}}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def twin(family: str) -> Any:
    return FAMILIES[family]()


@pytest.fixture(scope="module")
def folder(twin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(twin, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def greedy(twin: Any) -> list[int]:
    return separated_greedy(twin)


def test_every_row_has_a_twin() -> None:
    assert set(ARCHITECTURES) == set(FAMILIES)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_logits_and_greedy_tokens_match(twin: Any, greedy: list[int], folder: Path, chunk: int) -> None:
    ours = load(folder)
    assert_same_logits(ours, twin, chunk=chunk)
    assert_same_greedy(ours, greedy, chunk=chunk)


def test_the_engine_says_the_same(greedy: list[int], folder: Path) -> None:
    params = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)
    prompts = [prompt_of(PROMPT_LEN), prompt_of(5, seed=12)]
    with LLM(folder, skip_tokenizer_init=True, device="cpu", max_num_tokens=16, max_batch_size=2) as llm:
        first, _ = llm.generate(prompts, params)
    assert first.error is None and first.outputs[0].token_ids == greedy


def test_gguf_twin_matches(family: str, tmp_path: Path) -> None:
    twin = FAMILIES[family](**OF_GGUF.get(family, {}))
    ours = load(write_gguf(twin, tmp_path / "model.gguf"))
    assert_same_logits(ours, twin, chunk=7)


def test_every_changed_tensor_is_seen(twin: Any, folder: Path) -> None:
    ours = load(folder)
    prompt = prompt_of(PROMPT_LEN)
    expected = hf_logits(twin, prompt)
    names = [name for name, _ in ours.named_parameters() if "layers." not in name or "layers.1." in name]
    for name in names:
        parameter = ours.get_parameter(name)
        kept = parameter.data.clone()
        # A stride that divides no row, or every output might shift alike, which a LayerNorm takes out again.
        parameter.data.view(-1)[::7] += 0.5
        given = PagedRunner(ours).logits(prompt, chunk=PROMPT_LEN)
        assert relative_error(given, expected) > 1e-3, name
        parameter.data.copy_(kept)
    assert_same_logits(ours, twin, chunk=PROMPT_LEN)


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


def test_bfloat16_stays_near_float32(twin: Any, folder: Path) -> None:
    prompt = prompt_of(20)
    ours = load(folder, dtype=torch.bfloat16)
    given = PagedRunner(ours, kv_dtype=torch.bfloat16).logits(prompt, chunk=7)
    # bfloat16 keeps 8 bits: 0.4% a step, several percent over 3 layers drawn this wide, or 7 of raised norms.
    assert relative_error(given, hf_logits(twin, prompt)) < (0.2 if ours.config.num_layers > 3 else 0.15)


@pytest.mark.parametrize("rank", [0, 1])
def test_two_tensor_ranks_hold_half_each(family: str, rank: int) -> None:
    cls = ARCHITECTURES.get(family)
    config = cls.Config.from_hf(FAMILIES[family](**OF_TWO_RANKS.get(family, {})).config.to_dict())

    def parameters(mesh: Mesh) -> dict[str, int]:
        model = cls(config, mesh=mesh, quant=Unquantized(), dtype=torch.float32, device="cpu")
        return {name: parameter.nbytes for name, parameter in model.named_parameters()}

    whole = parameters(Mesh())
    # Norms, and the bias that is added once all ranks' parts are summed, are whole on every rank.
    replicated = sum(size for name, size in whole.items() if "norm" in name or "down.bias" in name)
    held = parameters(Mesh(tp_size=2, tp_rank=rank))
    assert sum(held.values()) <= sum(whole.values()) / 2 + replicated


@pytest.mark.parametrize("window", [1, 8, 60, None])
def test_windows_of_mistral_match(tmp_path: Path, window: int | None) -> None:
    """Shorter than the prompt of 37, longer than it but not than what is generated, and none."""
    twin = make_mistral(sliding_window=window)
    ours = load(save(twin, tmp_path / "model"))
    (group,) = ours.cache_groups()
    assert (group.kind, group.window) == (("full", 0) if window is None else ("window", window))
    for chunk in (1, 7):
        assert_same_logits(ours, twin, chunk=chunk)
    runner = PagedRunner(ours)
    tokens = prompt_of(101)
    assert relative_error(runner.logits(tokens, chunk=7), hf_logits(twin, tokens)) <= 1e-4
    # Blocks of 4 leave the window as it moves, and only then.
    assert (runner.num_stale > 5) is (window is not None)


VARIANTS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (
        make_llama,
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    (make_llama, {"attention_bias": True, "mlp_bias": True}),
    (
        make_llama,
        {
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        },
    ),
    (make_llama, {"hidden_act": "gelu_pytorch_tanh", "head_dim": 24}),
    (make_gemma3, {"final_logit_softcapping": 3.0}),
    (make_gemma3, {"attention_bias": True}),
    (make_gemma3, {"num_key_value_heads": 2, "hidden_activation": "silu"}),
    (
        make_gemma3,
        {"layer_types": ["full_attention", "sliding_attention"] * 3, "num_hidden_layers": 6},
    ),
    (
        make_gemma3,
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
    ),
    (make_mistral, {"head_dim": None, "num_key_value_heads": 4, "sliding_window": None}),
    (make_mistral, {"tie_word_embeddings": True, "rope_parameters": dict(YARN)}),
    (make_qwen2, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    (make_qwen2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    (make_qwen2, {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}),
    (make_qwen2, {"rope_parameters": dict(YARN)}),
    (make_qwen2, {"rope_parameters": YARN | {"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0}}),
    (make_qwen2, {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}),
    (make_qwen3, {"tie_word_embeddings": False, "attention_bias": True}),
    (make_qwen3, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    (make_gptj, {"rotary_dim": 16, "n_inner": None}),
    (make_gptj, {"rotary_dim": 2, "activation_function": "relu"}),
]


def case_name(case: Any) -> str:
    return getattr(case, "__name__", None) or str(case)[:60]


@pytest.mark.parametrize(("make", "changes"), VARIANTS, ids=case_name)
def test_variants_match(tmp_path: Path, make: Callable[..., Any], changes: dict[str, Any]) -> None:
    twin = make(**changes)
    assert_same_logits(load(save(twin, tmp_path / "model")), twin, chunk=7)


def test_later_layers_of_qwen_see_a_window(tmp_path: Path) -> None:
    twin = make_qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    local, rest = load(save(twin, tmp_path / "model")).cache_groups()
    assert (local.kind, local.window, local.layers) == ("window", 8, (1, 2))
    assert (rest.kind, rest.layers) == ("full", (0,))


@pytest.mark.parametrize("make", [make_mistral, make_qwen2, make_qwen3])
def test_yarn_of_gguf_matches_and_extends_the_context(tmp_path: Path, make: Callable[..., Any]) -> None:
    twin = make(max_position_embeddings=64, rope_parameters=dict(YARN))
    ours = load(write_gguf(twin, tmp_path / "model.gguf"))
    assert ours.config.max_position_embeddings == 128
    assert_same_logits(ours, twin, chunk=7)


@pytest.mark.parametrize("make", [make_qwen2, make_qwen3, make_gptj])
def test_quantised_gguf_is_near_its_twin(tmp_path: Path, make: Callable[..., Any]) -> None:
    twin = make()
    ours = load(write_gguf(twin, tmp_path / "model.gguf", quantize=True))
    given = PagedRunner(ours).logits(prompt_of(20), chunk=7)
    error = relative_error(given, hf_logits(twin, prompt_of(20)))
    # Q8_0 keeps 8 bits of every weight, a few percent of the largest logit; zero would mean plain weights.
    assert 1e-4 < error < 0.1


def test_buffers_of_older_gptj_files_are_ignored(tmp_path: Path) -> None:
    twin = make_gptj()
    places = load(save(twin, tmp_path / "model")).weight_map("hf")
    for name in ("transformer.h.2.attn.bias", "transformer.h.0.attn.masked_bias"):
        assert places[name].parameter is None and places[name].reason


def test_gguf_windows_that_do_not_say_their_layers_are_refused(tmp_path: Path) -> None:
    twin = make_qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(CheckpointError, match=r"qwen2\.attention\.sliding_window is set"):
        load(write_gguf(twin, tmp_path / "model.gguf"))
