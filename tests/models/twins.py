"""Which tiny random models stand in for the real families? Built with transformers, fixed seeds, large gaps.

Weights are drawn wide enough that the logits of the two best tokens lie far apart and greedy text does not
settle on one token; the parity tests assert both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slipstream.checkpoint.opening import open_checkpoint
from slipstream.models.loading import load_weights
from slipstream.models.registry import model_class, read_config
from slipstream.parallel.mesh import Mesh
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


def make_llama(*, seed: int = 2, **changes: Any) -> LlamaForCausalLM:
    """Build a Llama with llama3 rotary scaling and 2 kv heads for 4 query heads."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": dict(LLAMA3_SCALING),
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
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


def load(path: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Open, build and fill the model at `path`."""
    checkpoint = open_checkpoint(path)
    cls = model_class(checkpoint)
    config = read_config(cls, checkpoint)
    model = cls(config, mesh=Mesh(), quant=Unquantized(), dtype=dtype, device="cpu")
    load_weights(model, checkpoint)
    checkpoint.close()
    return model


LLAMA_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA3_NAMES = LLAMA_NAMES | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(model: Any, path: Path, *, quantize: bool = False) -> Path:
    """Write a GGUF file as a converter would: llama's q and k in rotary pairs, Gemma's norms as 1 + w.

    `quantize` stores the matrices as Q8_0, rounded; the input must then have rows of a multiple of 32.
    """
    config = model.config
    architecture = "gemma3" if "Gemma3" in type(model).__name__ else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    else:
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        if config.rope_parameters["rope_type"] == "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_factors(config).numpy())
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add_tensor(writer, architecture, config, name, tensor, quantize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(config: Any) -> torch.Tensor:
    """Return what the plain frequencies are divided by under llama3 scaling."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    base = config.rope_parameters["rope_theta"]
    plain = 1.0 / base ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    return plain / scaled


def _add_tensor(
    writer: gguf.GGUFWriter, architecture: str, config: Any, name: str, tensor: torch.Tensor, quantize: bool
) -> None:
    if architecture == "gemma3" and "norm" in name:
        tensor = tensor + 1.0
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        halves = tensor.reshape(-1, 2, config.head_dim // 2, *tensor.shape[1:])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    array = tensor.contiguous().numpy()
    if quantize and tensor.ndim == 2:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(gguf_name(architecture, name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    else:
        writer.add_tensor(gguf_name(architecture, name), array)


def gguf_name(architecture: str, name: str) -> str:
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    stem, _, kind = rest.rpartition(".")
    names = GEMMA3_NAMES if architecture == "gemma3" else LLAMA_NAMES
    return f"blk.{layer}.{names[stem]}.{kind}"
