"""Do the shards of every family together say what the whole model says, and hold no more than their share?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.checkpoint.opening import open_checkpoint
from slipstream.core.errors import ConfigError
from slipstream.layers.parameter import Parameter
from slipstream.models.loading import load_weights
from slipstream.models.registry import ARCHITECTURES, model_class, read_config
from slipstream.parallel.mesh import Mesh
from slipstream.quant.unquantized import Unquantized
from tests.models.families import FAMILIES
from tests.models.gguf_twins import write_gguf
from tests.models.harness import PagedRunner
from tests.models.lockstep import LockstepMesh, Meeting
from tests.models.parity import prompt_of, relative_error
from tests.models.twins import VOCAB, save

# Ranks add float32 products in another order: below 2e-6 of the largest value after 7 layers.
TOLERANCE = 1e-5
CHUNK = 7
PROMPT = prompt_of(30)
# A vocabulary of 129 makes the last rank pad its share.
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("LlamaForCausalLM", 2, {}),
    ("LlamaForCausalLM", 2, {"vocab_size": VOCAB + 1, "attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", 4, {"tie_word_embeddings": True}),
    ("MistralForCausalLM", 2, {}),
    ("Qwen2ForCausalLM", 2, {}),
    ("Qwen2ForCausalLM", 2, {"num_key_value_heads": 1}),
    ("Qwen3ForCausalLM", 2, {}),
    ("Gemma3ForCausalLM", 2, {"num_key_value_heads": 2}),
    ("Gemma3ForCausalLM", 2, {"num_key_value_heads": 1}),
    ("GPTJForCausalLM", 2, {}),
    ("GPTJForCausalLM", 4, {"vocab_size": VOCAB + 1}),
]


@dataclasses.dataclass
class Output:
    hidden_TD: Tensor
    logits_TV: Tensor
    greedy: list[int]


def build(path: Path, mesh: Mesh) -> Any:
    checkpoint = open_checkpoint(path)
    cls = model_class(checkpoint)
    config = read_config(cls, checkpoint)
    model = cls(config, mesh=mesh, quant=Unquantized(), dtype=torch.float32, device="cpu")
    load_weights(model, checkpoint)
    checkpoint.close()
    return model


def run(model: Any) -> Output:
    """Run the prompt in chunks, then decode it greedily beside another."""
    runner = PagedRunner(model)
    row, parts = runner.add(PROMPT), []
    while row.num_computed < len(PROMPT):
        parts += runner.step([(row, min(CHUNK, len(PROMPT) - row.num_computed))])
    hidden_TD = torch.cat(parts)
    greedy = runner.greedy([PROMPT, prompt_of(5, seed=12)], num_new=8, chunk=CHUNK)
    return Output(hidden_TD, model.logits(hidden_TD), greedy[0])


def run_ranks(path: Path, size: int, mesh_class: type[LockstepMesh] = LockstepMesh) -> tuple[Any, ...]:
    """Return (models, outputs, counts of collectives in the outputs) of `size` ranks in lock-step."""
    meeting = Meeting(size)
    models = [build(path, mesh_class(tp_size=size, tp_rank=rank, meeting=meeting)) for rank in range(size)]
    return models, meeting.run(lambda rank: run(models[rank])), meeting.counts


def test_every_row_is_sharded_here() -> None:
    assert {family for family, _, _ in CASES} == set(ARCHITECTURES)


@pytest.mark.parametrize(("family", "size", "changes"), CASES, ids=lambda case: str(case)[:40])
def test_ranks_together_equal_the_whole(
    tmp_path: Path, family: str, size: int, changes: dict[str, Any]
) -> None:
    path = save(FAMILIES[family](**changes), tmp_path / "model")
    whole = build(path, Mesh())
    expected = run(whole)
    models, outputs, counts = run_ranks(path, size)
    for output in outputs:
        assert relative_error(output.hidden_TD, expected.hidden_TD) <= TOLERANCE
        assert relative_error(output.logits_TV, expected.logits_TV) <= TOLERANCE
        assert output.logits_TV.shape == expected.logits_TV.shape
        assert output.greedy == expected.greedy
    # A step reduces the embedding and each layer's two parts; greedy decoding asks for logits row by row.
    steps = counts["all_reduce"] // (1 + 2 * whole.config.num_layers)
    assert counts["all_reduce"] == steps * (1 + 2 * whole.config.num_layers)
    assert steps >= len(PROMPT) // CHUNK + 8 and counts["all_gather"] == 1 + 2 * 8
    for model in models:
        assert_fair_share(model, whole, size)


def assert_fair_share(shard: Any, whole: Any, size: int) -> None:
    """Hold a shard to 1/size of the bytes, plus what every rank needs whole, stated one kind at a time."""
    replicated = copied_kv = 0
    for name, parameter in whole.named_parameters():
        assert isinstance(parameter, Parameter)
        if shard.get_parameter(name).dim is None:
            # Vectors only: norms, and biases that join after a reduction.
            assert parameter.ndim == 1, name
            replicated += parameter.nbytes
    config = whole.config
    row_bytes = 4 * config.hidden_size
    heads = [shard.embedding] if config.is_tied else [shard.embedding, shard.head]
    rows = -(-config.vocab_size // size) * size - config.vocab_size
    padded = len(heads) * rows * row_bytes + (4 * rows if config.has_head_bias else 0)
    if config.num_kv_heads < size:
        # Each rank keeps a whole kv head, instead of its share of one.
        width = row_bytes + (4 if config.has_qkv_bias else 0)
        copied_kv = 2 * config.num_layers * config.head_dim * (size - config.num_kv_heads) * width
    total = sum(parameter.nbytes for parameter in whole.parameters())
    held = sum(parameter.nbytes for parameter in shard.parameters())
    assert held * size == total - replicated + replicated * size + padded + copied_kv
    assert held < 0.75 * total


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "GPTJForCausalLM"])
def test_shards_of_gguf_equal_the_whole(tmp_path: Path, architecture: str) -> None:
    """Rows that are put back in order, and types with blocks, are cut at the right places."""
    path = write_gguf(FAMILIES[architecture](), tmp_path / "model.gguf", quantize=True)
    expected = run(build(path, Mesh()))
    for output in run_ranks(path, 2)[1]:
        assert relative_error(output.logits_TV, expected.logits_TV) <= TOLERANCE
        assert output.greedy == expected.greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_do_not_divide_are_refused(tmp_path: Path, family: str) -> None:
    path = save(FAMILIES[family](), tmp_path / "model")
    for rank in range(3):
        with pytest.raises(ConfigError, match=r"3 tensor ranks"):
            build(path, Mesh(tp_size=3, tp_rank=rank))


class DeafMesh(LockstepMesh):
    """A rank that meets the others and then keeps its own part."""

    def all_reduce(self, x: Tensor) -> Tensor:
        self.meeting.exchange(self.tp_rank, x, "all_reduce")
        return x


class SwappedMesh(LockstepMesh):
    """A rank that concatenates in the wrong order."""

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self.meeting.exchange(self.tp_rank, x, "all_gather")[::-1], dim)


@pytest.mark.parametrize("mesh_class", [DeafMesh, SwappedMesh])
def test_a_wrong_collective_is_seen(tmp_path: Path, mesh_class: type[LockstepMesh]) -> None:
    path = save(FAMILIES["Qwen2ForCausalLM"](), tmp_path / "model")
    expected = run(build(path, Mesh()))
    for output in run_ranks(path, 2, mesh_class)[1]:
        assert relative_error(output.logits_TV, expected.logits_TV) > 0.1


def test_a_failing_rank_ends_the_others() -> None:
    meeting = Meeting(2)

    def work(rank: int) -> None:
        if rank == 1:
            raise ZeroDivisionError
        meeting.exchange(rank, torch.zeros(1), "all_reduce")

    with pytest.raises(ZeroDivisionError):
        meeting.run(work)
