"""Does a block run as one native call like the block of layers it stands for? Every family, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.attention.cpu import CpuPaged
from slipstream.kernels.cpu.library import library
from slipstream.kernels.cpu.packed_matrix import Kind
from slipstream.quant.int8 import Int8
from slipstream.quant.packed import Packed
from tests.models.families import FAMILIES
from tests.models.harness import PagedRunner
from tests.models.parity import CHUNKS, PROMPT_LEN, TOLERANCE, prompt_of, relative_error
from tests.models.twins import hf_logits, load, save

MAKERS = FAMILIES


class PackedFloat(Packed):
    """Weights in packed form but not quantised, so that only the block itself is judged."""

    def kind_of(self, stored: str) -> Kind:
        return Kind.F32


@pytest.fixture(scope="module", params=sorted(MAKERS))
def twin(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def folder(twin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(twin, tmp_path_factory.mktemp("twin"))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Any:
    backend = CpuPaged()
    before = library().ss_num_threads()
    library().ss_set_threads(request.param)
    yield backend
    library().ss_set_threads(before)


def runner_of(model: Any, backend: CpuPaged, *, kv_dtype: torch.dtype = torch.float32) -> PagedRunner:
    return PagedRunner(model, backend=backend, kv_dtype=kv_dtype)


def native_calls(model: Any) -> int:
    return sum(stack.num_calls * len(stack.calls) for stack in model.layers.stacks)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_logits_match_the_twin(twin: Any, folder: Path, threads: CpuPaged, chunk: int) -> None:
    model = load(folder, quant=PackedFloat())
    prompt = prompt_of(PROMPT_LEN)
    given = runner_of(model, threads).logits(prompt, chunk=chunk)
    assert native_calls(model) == model.config.num_layers * -(-PROMPT_LEN // chunk)
    assert relative_error(given, hf_logits(twin, prompt)) <= TOLERANCE


def test_the_composed_block_says_the_same(folder: Path) -> None:
    native, composed = load(folder, quant=Int8()), load(folder, quant=Int8())
    composed.layers.stacks = ()
    prompt = prompt_of(PROMPT_LEN)
    given = runner_of(native, CpuPaged()).logits(prompt, chunk=PROMPT_LEN)
    expected = runner_of(composed, CpuPaged()).logits(prompt, chunk=PROMPT_LEN)
    assert native_calls(native) == native.config.num_layers
    assert native_calls(composed) == 0
    # Same weights and codes of activations, but float sums in another order: where a code rounds the other
    # way, one part in 127 of one input changes. A wrong option of the block is off by far more.
    assert relative_error(given, expected) <= 0.02


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16])
def test_bits_do_not_depend_on_chunks_neighbours_or_threads(folder: Path, kv_dtype: torch.dtype) -> None:
    model = load(folder, quant=Int8())
    prompt, other = prompt_of(PROMPT_LEN), prompt_of(29, seed=5)
    found = []
    try:
        for num_threads in (1, 2, 3):
            backend = CpuPaged()
            library().ss_set_threads(num_threads)
            for chunk in (1, 5, PROMPT_LEN):
                found.append(runner_of(model, backend, kv_dtype=kv_dtype).logits(prompt, chunk=chunk))
            runner = runner_of(model, backend, kv_dtype=kv_dtype)
            rows = [runner.add(other), runner.add(prompt), runner.add(other[:3])]
            hidden = runner.step([(row, len(row.tokens)) for row in rows])[1]
            found.append(model.logits(hidden))
    finally:
        CpuPaged()
    assert all(torch.equal(found[0], logits) for logits in found[1:])
    model.layers[0].mlp.down.weight.in_order()[0].data[0] ^= 1
    changed = runner_of(model, CpuPaged(), kv_dtype=kv_dtype).logits(prompt, chunk=5)
    assert not torch.equal(found[0], changed), "one changed code must show, or the comparison proves nothing"
