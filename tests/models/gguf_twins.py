"""How does a twin become a GGUF file? As a converter would write it, names, order of rows and metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ARCHITECTURES = {
    "Gemma3ForCausalLM": "gemma3",
    "GPTJForCausalLM": "gptj",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
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
QWEN3_NAMES = LLAMA_NAMES | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
GPTJ_NAMES = {
    "ln_1": "attn_norm",
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.out_proj": "attn_output",
    "mlp.fc_in": "ffn_up",
    "mlp.fc_out": "ffn_down",
}
BLOCK_NAMES = {
    "gemma3": GEMMA3_NAMES,
    "gptj": GPTJ_NAMES,
    "llama": LLAMA_NAMES,
    "qwen2": LLAMA_NAMES,
    "qwen3": QWEN3_NAMES,
}
OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "transformer.wte": "token_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}


def write_gguf(model: Any, path: Path, *, quantize: bool = False) -> Path:
    """Write a GGUF file: llama's q and k in rotary pairs, Gemma's norms as 1 + w.

    `quantize` stores the matrices as Q8_0, rounded; the input must then have rows of a multiple of 32.
    """
    config, architecture = model.config, ARCHITECTURES[type(model).__name__]
    writer = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer, config, architecture)
    _add_rope(writer, config, architecture)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add_tensor(writer, architecture, config, name, tensor, quantize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_sizes(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gptj":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def _add_rope(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    if architecture == "gptj":
        writer.add_rope_dimension_count(config.rotary_dim)
        return
    if architecture == "gemma3":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        return
    writer.add_rope_dimension_count(head_dim_of(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config).numpy())
    if config.rope_parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])


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
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{kind}"
    inner = name.removeprefix("model.layers.").removeprefix("transformer.h.")
    layer, _, rest = inner.partition(".")
    stem = rest.rpartition(".")[0]
    return f"blk.{layer}.{BLOCK_NAMES[architecture][stem]}.{kind}"
