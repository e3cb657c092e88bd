"""Does loading refuse everything that does not fit, all of it at once, before it reads a weight?"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.checkpoint.base import WeightTensor
from slipstream.checkpoint.opening import open_checkpoint
from slipstream.core.errors import CheckpointError
from slipstream.models.llama import Llama, LlamaConfig
from slipstream.models.loading import load_weights
from slipstream.parallel.mesh import Mesh
from slipstream.quant.unquantized import Unquantized
from tests.models.gguf_twins import write_gguf
from tests.models.twins import load, make_llama, save


@dataclasses.dataclass
class Memory:
    """A checkpoint of tensors in memory that counts what is read."""

    content: list[tuple[str, torch.Tensor]]
    dtype: str = "F32"
    format: str = "hf"
    path: Path = Path("memory")
    reads: int = 0

    def tensors(self):
        for name, tensor in self.content:
            read = functools.partial(self._read, tensor)
            yield WeightTensor(name, tuple(tensor.shape), self.dtype, tensor.nbytes, read)

    def _read(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        self.reads += 1
        return tensor[start:stop]


@pytest.fixture(scope="module")
def twin() -> Any:
    return make_llama()


@pytest.fixture
def content(twin: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.clone()) for name, tensor in twin.state_dict().items()]


def build(twin: Any, mesh: Mesh | None = None) -> Llama:
    config = LlamaConfig.from_hf(twin.config.to_dict())
    return Llama(config, mesh=mesh or Mesh(), quant=Unquantized(), dtype=torch.float32, device="cpu")


def test_everything_wrong_is_listed_before_anything_is_read(twin: Any, content: list[Any]) -> None:
    del content[5]
    missing = next(name for name in twin.state_dict() if name not in dict(content))
    content[3] = (content[3][0], content[3][1][:-1])
    content.append(("model.layers.9.self_attn.q_proj.weight", torch.zeros(2, 2)))
    content.append(content[1])
    memory = Memory(content)
    with pytest.raises(CheckpointError) as caught:
        load_weights(build(twin), memory)
    message = str(caught.value)
    assert f"missing: {missing}" in message
    assert "unexpected: model.layers.9.self_attn.q_proj.weight" in message
    assert f"misshapen: {content[3][0]}" in message
    assert f"duplicate: {content[1][0]} (2 times)" in message
    assert memory.reads == 0


def test_buffers_of_hugging_face_are_ignored_by_name(twin: Any, content: list[Any]) -> None:
    content.append(("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8)))
    load_weights(build(twin), Memory(content))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_norm_that_is_not_finite_is_refused(twin: Any, content: list[Any], bad: float) -> None:
    dict(content)["model.layers.1.input_layernorm.weight"][4] = bad
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm.*row 4"):
        load_weights(build(twin), Memory(content))


def test_a_quantised_scale_that_is_not_finite_is_refused(twin: Any, tmp_path: Path) -> None:
    path = write_gguf(twin, tmp_path / "model.gguf", quantize=True)
    load(path)
    data = bytearray(path.read_bytes())
    # The first two bytes of a Q8_0 block are its float16 scale; 0x7e00 is NaN. The last tensor, padded to 32
    # bytes, ends the file.
    checkpoint = open_checkpoint(path)
    last = list(checkpoint.tensors())[-1]
    checkpoint.close()
    assert last.dtype == "Q8_0"
    start = len(data) - -(-last.num_bytes // 32) * 32
    data[start : start + 2] = b"\x00\x7e"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{last.name}.*NaN or infinity in row 0"):
        load(path)


def test_two_ranks_together_hold_every_weight(twin: Any, content: list[Any]) -> None:
    whole = build(twin)
    load_weights(whole, Memory(content))
    shards = [build(twin, Mesh(tp_size=2, tp_rank=rank)) for rank in range(2)]
    for shard in shards:
        load_weights(shard, Memory(content))
    q, k, v = whole.layers[0].attention.qkv.weight.split([64, 32, 32])
    for rank, shard in enumerate(shards):
        expected = torch.cat([part.chunk(2)[rank] for part in (q, k, v)])
        assert torch.equal(shard.layers[0].attention.qkv.weight, expected)
        gate, up = (part.chunk(2)[rank] for part in whole.layers[0].mlp.gate_up.weight.chunk(2))
        assert torch.equal(shard.layers[0].mlp.gate_up.weight, torch.cat((gate, up)))
        down = whole.layers[0].mlp.down.weight.chunk(2, dim=1)[rank]
        assert torch.equal(shard.layers[0].mlp.down.weight, down)
        assert torch.equal(shard.embedding.weight, whole.embedding.weight.chunk(2)[rank])


def test_gguf_pairs_are_split_per_rank(twin: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(twin, tmp_path / "model.gguf"))
    config = LlamaConfig.from_gguf(checkpoint.config, checkpoint.tensor_names())
    mesh = Mesh(tp_size=2, tp_rank=1)
    shard = Llama(config, mesh=mesh, quant=Unquantized(), dtype=torch.float32, device="cpu")
    load_weights(shard, checkpoint)
    q = twin.state_dict()["model.layers.2.self_attn.q_proj.weight"]
    assert torch.equal(shard.layers[2].attention.qkv.weight[:32], q[32:])


def test_progress_ends_at_all_bytes(twin: Any, content: list[Any]) -> None:
    seen: list[tuple[int, int]] = []
    load_weights(build(twin), Memory(content), progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for _, tensor in content)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_weight_map_that_forgets_a_slot_is_an_error(twin: Any, content: list[Any]) -> None:
    model = build(twin)
    full = model.weight_map("hf")
    name = "model.layers.0.self_attn.v_proj.weight"
    model.weight_map = lambda format: {key: place for key, place in full.items() if key != name}
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.qkv\.weight \(slot 'v'\) 0 times"):
        load_weights(model, Memory(content))


def test_saved_folder_loads(twin: Any, tmp_path: Path) -> None:
    ours = load(save(twin, tmp_path / "model"))
    assert torch.equal(ours.head.weight, twin.lm_head.weight)
