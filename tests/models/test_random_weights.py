"""Do random weights have the right size, repeat by seed, and carry a prompt to an answer?"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.checkpoint.dummy import DummyCheckpoint
from slipstream.core.errors import UnsupportedError
from slipstream.core.sampling_params import SamplingParams
from slipstream.layers.parameter import Parameter
from slipstream.llm import LLM
from slipstream.models.llama import Llama, LlamaConfig
from slipstream.models.loading import load_weights
from slipstream.models.random_weights import TILE_ELEMENTS, fill_random
from slipstream.parallel.mesh import Mesh
from slipstream.quant.unquantized import Unquantized
from tests.models.harness import PagedRunner

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": True,
    "mlp_bias": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def build(mesh: Mesh | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Llama:
    config = LlamaConfig.from_hf(CONFIG | changes)
    return Llama(config, mesh=mesh or Mesh(), quant=Unquantized(), dtype=dtype, device="cpu")


def test_matrices_are_scaled_norms_are_one_and_biases_zero() -> None:
    model = build()
    fill_random(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            # The deviation of n draws is itself off by 1 / sqrt(2n): six of these.
            expected, off = parameter.shape[1] ** -0.5, 6 / math.sqrt(2 * parameter.numel())
            assert abs(float(parameter.std()) / expected - 1) < off
            assert abs(float(parameter.mean())) < expected * 6 / math.sqrt(parameter.numel())


def test_a_seed_repeats_and_another_differs() -> None:
    first, again, other = build(), build(), build()
    fill_random(first, seed=5)
    fill_random(again, seed=5)
    fill_random(other, seed=6)
    for one, two, three in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.ndim == 1 or not torch.equal(one, three)


def test_a_matrix_larger_than_the_tile_repeats_no_row() -> None:
    width = 2048
    matrix = Parameter.create((2 * TILE_ELEMENTS // width, width), dtype=torch.bfloat16, device="cpu", dim=0)
    model = torch.nn.Module()
    model.register_parameter("weight", matrix)
    fill_random(model)
    assert len(matrix.data[:, :8].float().unique(dim=0)) == matrix.shape[0]
    assert bool(matrix.data.isfinite().all())


def test_padding_of_the_vocabulary_stays_zero() -> None:
    # 131 rows over 2 ranks: 66 each, the last of rank 1 is padding.
    model = build(Mesh(tp_size=2, tp_rank=1))
    fill_random(model)
    assert not model.embedding.weight[65].any() and bool(model.embedding.weight[64].all())
    # A matrix that is cut by columns is scaled by all its inputs, not by this rank's.
    assert abs(float(model.layers[0].mlp.down.weight.std()) * 128**0.5 - 1) < 0.1


def test_a_deep_model_in_bfloat16_stays_finite() -> None:
    model = build(dtype=torch.bfloat16, num_hidden_layers=32)
    fill_random(model)
    logits = PagedRunner(model, kv_dtype=torch.bfloat16).logits(list(range(64)), chunk=16)
    assert bool(logits.isfinite().all())
    # A unit vector times rows of unit length per input: logits of about 1.
    assert 0.5 < float(logits.std()) < 2.0


@pytest.mark.gpu
def test_eight_billion_weights_are_made_on_the_gpu_in_seconds() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128_256}
    config = LlamaConfig.from_hf(CONFIG | sizes | {"num_attention_heads": 32, "num_key_value_heads": 8})
    device = torch.device("cuda")
    model = Llama(config, mesh=Mesh(), quant=Unquantized(), dtype=torch.bfloat16, device=device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated, started = torch.cuda.memory_allocated(), time.monotonic()
    fill_random(model)
    torch.cuda.synchronize()
    assert time.monotonic() - started < 3.0
    # No copy of a parameter, on either side.
    assert torch.cuda.max_memory_allocated() - allocated < 16 << 20
    assert all(bool(parameter.data.isfinite().all()) for parameter in model.parameters())


def test_loading_fills_and_reports_progress(folder: Path) -> None:
    model, seen = build(), []
    load_weights(model, DummyCheckpoint(folder), progress=lambda done, total: seen.append((done, total)))
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert seen[-1] == (total, total)
    assert float(model.layers[1].attention.qkv.weight.std()) > 0.1


def test_packed_weights_are_refused_by_name() -> None:
    model = build()
    packed = Parameter.create((4, 4), dtype=torch.uint8, device="cpu")
    model.layers[1].mlp.down.register_parameter("packed", packed)
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.down\.packed is kept as torch\.uint8"):
        fill_random(model)


def test_a_configuration_alone_answers_token_ids(folder: Path) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    with LLM(folder, load_format="dummy", skip_tokenizer_init=True, device="cpu") as llm:
        (output,) = llm.generate([[1, 2, 3]], params)
    with LLM(folder, load_format="dummy", device="cpu") as llm:
        (again,) = llm.generate([[1, 2, 3]], params)
        (refused,) = llm.generate(["text"], params)
    assert output.error is None and len(output.outputs[0].token_ids) == 5
    assert again.outputs[0].token_ids == output.outputs[0].token_ids
    assert refused.error is not None
    assert "has no tokenizer" in str(refused.error) and "Give token ids" in str(refused.error)
