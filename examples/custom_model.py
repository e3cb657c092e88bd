"""A decoder of your own, attention and MLP side by side, registered from outside, run on random weights."""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from slipstream import LLM, SamplingParams
from slipstream.core.cache_group import CacheGroup
from slipstream.layers.attention import SelfAttention
from slipstream.layers.build_context import BuildContext
from slipstream.layers.embedding import LMHead, VocabEmbedding
from slipstream.layers.mlp import GatedMLP
from slipstream.layers.norm import RMSNorm
from slipstream.layers.rotary import RopeConfig, Rotary
from slipstream.models.base import run_layers
from slipstream.models.registry import register_model
from slipstream.models.weight_map import Place


class Config(NamedTuple):
    vocab_size: int = 256
    max_position_embeddings: int = 256
    hidden_size: int = 64
    num_layers: int = 2

    @classmethod
    def from_hf(cls, config):
        return cls(*(config[name] for name in cls._fields))


class Block(torch.nn.Module):
    def __init__(self, build, config, idx, rotary):
        super().__init__()
        size, heads = config.hidden_size, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
        self.norm = RMSNorm(build, size, 1e-6)
        self.attention = SelfAttention.create(build, size, **heads, layer_idx=idx, rotary_embedding=rotary)
        self.mlp = GatedMLP(build, size, 4 * size)

    def forward(self, x, batch):
        return x + self.attention(normed := self.norm(x), batch) + self.mlp(normed)


class Decoder(torch.nn.Module):
    Config = Config

    def __init__(self, config, **build):
        super().__init__()
        self.config, build = config, BuildContext(**build)
        self.embedding = VocabEmbedding(build, config.vocab_size, config.hidden_size)
        rotary = Rotary(build, RopeConfig(theta=10_000.0), head_dim=16)
        self.layers = torch.nn.ModuleList(Block(build, config, i, rotary) for i in range(config.num_layers))
        self.logits = LMHead(build, config.vocab_size, config.hidden_size)

    def cache_groups(self):
        layers, heads = tuple(range(len(self.layers))), self.layers[0].attention.kv_heads
        return [CacheGroup(layers=layers, kind="full", heads=heads, head_dim=16)]

    def forward(self, batch):
        return run_layers(self.layers, self.embedding(batch), batch)

    def weight_map(self, format):  # a tensor for every slot: "layers.0.mlp.gate_up.weight.gate" and so on
        return {f"{name}.{slot}": Place(w, slot) for name, w in self.named_parameters() for slot in w.slots}


if __name__ == "__main__":
    torch.manual_seed(0)
    register_model("Mine", Decoder)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"architectures": ["Mine"], **Config()._asdict()}))
        places = Decoder(Config(), device="meta").weight_map("hf").items()
        weights = {name: torch.randn(p.parameter.expected_shape(p.slot)) / 5 for name, p in places}
        save_file(weights, Path(folder, "model.safetensors"))
        with LLM(folder, skip_tokenizer_init=True) as llm:
            for output in llm.generate([[1, 2, 3], [7, 8]], SamplingParams(max_tokens=8, detokenize=False)):
                print(output.prompt_token_ids, "->", output.outputs[0].token_ids)
