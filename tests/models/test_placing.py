"""Do several threads with staging buffers place what one does, and stop at the first thing that is wrong?"""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.checkpoint.base import WeightTensor
from slipstream.checkpoint.opening import open_checkpoint
from slipstream.checkpoint.staging import MIN_BUFFER_BYTES, NUM_BUFFERS, Staging
from slipstream.core.errors import CheckpointError
from slipstream.models.llama import Llama, LlamaConfig
from slipstream.models.loading import fitting_tensors
from slipstream.models.placing import device_of, place_all, read_in_place
from slipstream.parallel.mesh import Mesh
from slipstream.quant.unquantized import Unquantized
from tests.models.twins import make_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several shards, so that threads read several files."""
    path = tmp_path_factory.mktemp("shards")
    make_llama().save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def build(checkpoint: Any, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    config = LlamaConfig.from_hf(checkpoint.config)
    return Llama(config, mesh=Mesh(), quant=Unquantized(), dtype=dtype, device=device)


def fill(folder: Path, *, num_threads: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    checkpoint = open_checkpoint(folder)
    try:
        model = build(checkpoint, dtype, device)
        places = model.weight_map("hf")
        seen: list[tuple[int, int]] = []
        tensors = fitting_tensors(model, checkpoint)
        place_all(places, tensors, lambda done, total: seen.append((done, total)), num_threads=num_threads)
    finally:
        checkpoint.close()
    total = sum(tensor.num_bytes for tensor in tensors)
    done = [at for at, _ in seen]
    assert done == sorted(done) and done[-1] == total and {of for _, of in seen} == {total}
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_place_the_same(folder: Path, num_threads: int, dtype: torch.dtype) -> None:
    expected = fill(folder, num_threads=1, dtype=dtype).state_dict()
    given = fill(folder, num_threads=num_threads, dtype=dtype).state_dict()
    assert given.keys() == expected.keys() and len(given) > 10
    for name, tensor in expected.items():
        assert torch.equal(given[name], tensor), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gets_the_same(folder: Path, dtype: torch.dtype) -> None:
    expected = fill(folder, num_threads=1, dtype=dtype).state_dict()
    for _ in range(5):
        given = fill(folder, num_threads=6, dtype=dtype, device="cuda").state_dict()
        for name, tensor in expected.items():
            assert torch.equal(given[name].cpu(), tensor), name


def in_memory(rows: torch.Tensor, name: str = "w") -> WeightTensor:
    def read_into(start: int, stop: int, buffer: Any) -> None:
        buffer[:] = rows[start:stop].reshape(-1).view(torch.uint8).numpy()

    shape = tuple(rows.shape)
    return WeightTensor(name, shape, "F32", rows.nbytes, lambda i, j: rows[i:j], read_into=read_into)


def test_a_chunk_is_not_overwritten_by_the_next() -> None:
    rows = torch.randn(40, 6)
    staging = Staging(CPU)
    tensor = staging.staged(in_memory(rows))
    chunks = [tensor.read(at, at + 8) for at in range(0, 40, 8)]
    assert len(chunks) > NUM_BUFFERS and torch.equal(torch.cat(chunks), rows)
    assert staging.num_bytes == rows.nbytes


def test_a_row_larger_than_a_buffer_still_comes() -> None:
    rows = torch.arange(MIN_BUFFER_BYTES // 4 + 3, dtype=torch.float32).repeat(2, 1)
    tensor = Staging(CPU).staged(in_memory(rows))
    assert torch.equal(tensor.read(1, 2), rows[1:2]) and torch.equal(tensor.read(0, 2), rows)


def test_what_cannot_be_staged_comes_as_ever() -> None:
    vector = in_memory(torch.randn(9))
    unreadable = dataclasses.replace(in_memory(torch.randn(3, 3)), read_into=None)
    staging = Staging(CPU)
    assert staging.staged(vector) is vector and staging.staged(unreadable) is unreadable


def test_rows_are_read_into_memory_of_the_right_size(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    try:
        tensor = next(t for t in checkpoint.tensors() if len(t.shape) == 2)
        assert tensor.read_into is not None
        buffer = torch.empty(2 * tensor.shape[1] * 4, dtype=torch.uint8)
        tensor.read_into(1, 3, buffer.numpy())
        assert torch.equal(buffer.view(torch.float32).view(2, -1), tensor.read(1, 3))
        with pytest.raises(ValueError, match="rows 0 to 1 of"):
            tensor.read_into(0, 1, buffer.numpy())
        with pytest.raises(IndexError):
            tensor.read_into(0, tensor.shape[0] + 1, buffer.numpy())
    finally:
        checkpoint.close()


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_file_that_changes_meanwhile_is_refused(folder: Path, num_threads: int, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    before = threading.active_count()
    try:
        model = build(checkpoint)
        tensors = fitting_tensors(model, checkpoint)
        os.truncate(sorted(tmp_path.glob("*.safetensors"))[1], 100)
        with pytest.raises(CheckpointError, match="changed while being read"):
            place_all(model.weight_map("hf"), tensors, None, num_threads=num_threads)
    finally:
        checkpoint.close()
    assert threading.active_count() == before


def test_only_what_may_stay_as_it_is_is_read_in_place(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    try:
        narrow, wide = build(checkpoint, torch.bfloat16), build(checkpoint)
        names = {name: tensor for tensor in checkpoint.tensors() for name in [tensor.name]}
        places = (wide.weight_map("hf"), narrow.weight_map("hf"))
        for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight"):
            same, other = (found[name] for found in places)
            assert same.parameter is not None and other.parameter is not None and same.slot in ("k", "up")
            same.parameter.data.fill_(7.0)
            assert read_in_place(same.parameter, names[name], same.slot)
            rule = same.parameter.slots[same.slot]
            assert torch.equal(
                same.parameter[rule.offset : rule.offset + rule.length], names[name].read_all()
            )
            # Neighbours in the fused matrix are not touched.
            assert int((same.parameter == 7.0).all(1).sum()) == same.parameter.shape[0] - rule.length
            assert not read_in_place(other.parameter, names[name], other.slot)
        norm, down = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
        assert not read_in_place(places[0][norm].parameter, names[norm], "")
        # Whole rows, though a rank would own some of their columns; a share of them comes by chunks.
        whole = places[0][down].parameter
        assert read_in_place(whole, names[down], "") and torch.equal(whole.data, names[down].read_all())
        whole.slots = {"": dataclasses.replace(whole.slots[""], length=whole.slots[""].length // 2)}
        assert not read_in_place(whole, names[down], "")
        with pytest.raises(CheckpointError, match="has shape"):
            read_in_place(places[0]["model.embed_tokens.weight"].parameter, names[down], "")
    finally:
        checkpoint.close()


def test_the_device_is_the_parameters(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert device_of(build(checkpoint, device="meta").weight_map("hf")) == torch.device("meta")
    assert device_of({}) == CPU
    checkpoint.close()
