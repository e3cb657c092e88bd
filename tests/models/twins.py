"""Which tiny random models stand in for the real families? Built with transformers, fixed seeds, large gaps.

Weights are drawn wide enough that the logits of the two best tokens lie far apart and greedy text does not
settle on one token; the parity tests assert both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from slipstream.checkpoint.opening import open_checkpoint
from slipstream.models.loading import load_weights
from slipstream.models.registry import model_class, read_config
from slipstream.parallel.mesh import Mesh
from slipstream.quant.base import QuantMethod
from slipstream.quant.unquantized import Unquantized

VOCAB = 128
POSITIONS = 512
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Sizes of the twins that are built like Llama: 2 kv heads for 4 query heads.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
}


def make_llama(*, seed: int = 2, **changes: Any) -> LlamaForCausalLM:
    """Build a Llama with llama3 rotary scaling."""
    fields = SMALL | {
        "head_dim": 16,
        "rope_parameters": dict(LLAMA3_SCALING),
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(fields | changes)))
    return _finish(model, seed)


def make_gemma3(*, seed: int = 3, **changes: Any) -> Gemma3ForCausalLM:
    """Build a Gemma 3 with 7 layers (6 local with a window of 8, 1 global), 1 kv head, 2 query heads."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 7,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**(fields | changes)))
    return _finish(model, seed)


def make_mistral(*, seed: int = 1, **changes: Any) -> MistralForCausalLM:
    """Build a Mistral with a window of 8 and a head size that is not hidden size over heads."""
    torch.manual_seed(seed)
    fields = SMALL | {"head_dim": 24, "sliding_window": 8}
    return _finish(MistralForCausalLM(MistralConfig(**(fields | changes))), seed)


def make_qwen2(*, seed: int = 2, **changes: Any) -> Qwen2ForCausalLM:
    """Build a Qwen2 with full attention; biases of q, k and v are the family's own."""
    torch.manual_seed(seed)
    return _finish(Qwen2ForCausalLM(Qwen2Config(**(SMALL | changes))), seed)


def make_qwen3(*, seed: int = 1, **changes: Any) -> Qwen3ForCausalLM:
    """Build a Qwen3 with heads of 32 over a hidden size of 64, and a tied head."""
    torch.manual_seed(seed)
    fields = SMALL | {"head_dim": 32, "tie_word_embeddings": True}
    return _finish(Qwen3ForCausalLM(Qwen3Config(**(fields | changes))), seed)


def make_gptj(*, seed: int = 2, **changes: Any) -> GPTJForCausalLM:
    """Build a GPT-J that turns 8 of the 16 elements of a head."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_inner": 96,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": POSITIONS,
        "rotary_dim": 8,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return _finish(GPTJForCausalLM(GPTJConfig(**(fields | changes))), seed)


def _finish(model: Any, seed: int) -> Any:
    """Give norms and biases values of their own, or a test could not tell that they were loaded.

    Gemma's norms after a part are raised: else its tied, scaled embedding makes every token repeat itself.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                raised = 3.0 if "gemma" in type(model).__name__.lower() and "post_" in name else 0.0
                parameter.copy_(0.2 * noise if "bias" in name else parameter + 0.2 * noise + raised)
    return model.float().train(False)


@torch.no_grad()
def hf_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].float()


@torch.no_grad()
def hf_greedy(model: Any, prompt: list[int], num_new: int) -> tuple[list[int], float]:
    """Return the greedy continuation and the smallest gap between the two best logits met on the way."""
    tokens, gap = list(prompt), float("inf")
    for _ in range(num_new):
        best = hf_logits(model, tokens)[-1].topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], gap


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def load(path: Path, *, dtype: torch.dtype = torch.float32, quant: QuantMethod | None = None) -> Any:
    """Open, build and fill the model at `path`; unquantised where no method is given."""
    checkpoint = open_checkpoint(path)
    cls = model_class(checkpoint)
    config = read_config(cls, checkpoint)
    model = cls(config, mesh=Mesh(), quant=quant or Unquantized(), dtype=dtype, device="cpu")
    load_weights(model, checkpoint)
    checkpoint.close()
    return model
