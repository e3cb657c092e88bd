"""Which fields do decoder configurations share, and what may they hold?

Invariant: every number is checked against a range, and every pair that must fit is checked, before a model
is built; the message names the field. Bounds are far above any published model and far below overflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from slipstream.checkpoint.fields import optional, require
from slipstream.checkpoint.weight_file import shown
from slipstream.core.errors import CheckpointError, nearest
from slipstream.layers.mlp import ACTIVATIONS
from slipstream.layers.rope_config import RopeConfig, rope_from_gguf, rope_from_hf

MAX_HIDDEN = 1 << 17
MAX_INTERMEDIATE = 1 << 20
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 1024
MAX_VOCAB = 1 << 23
MAX_POSITIONS = 1 << 28
MIN_EPS = 1e-15
GGUF = "GGUF metadata"
# What transformers and llama.cpp turn by where a file names no base.
DEFAULT_THETA = 10_000.0
RMS_EPS_KEY = "attention.layer_norm_rms_epsilon"
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def hf_decoder(config: Mapping[str, Any], *, default_theta: float = DEFAULT_THETA) -> dict[str, Any]:
    """Read what a `DecoderConfig` with one rotary embedding needs from a `config.json`."""
    sizes = hf_sizes(config)
    rope = rope_from_hf(config, max_positions=sizes["max_position_embeddings"], default_theta=default_theta)
    return with_rope(sizes, rope) | {
        "activation": hf_activation(config, "hidden_act"),
        "is_tied": optional(config, "tie_word_embeddings", bool, False),
    }


def gguf_decoder(
    metadata: Mapping[str, Any], architecture: str, tensor_names: Iterable[str]
) -> dict[str, Any]:
    """Read the same from GGUF metadata; the names tell of an untied head and of rotary factors."""
    names = set(tensor_names)
    refuse_experts(metadata, architecture)
    sizes = gguf_sizes(metadata, architecture)
    rope = rope_from_gguf(
        metadata,
        architecture,
        head_dim=sizes["head_dim"],
        max_positions=sizes["max_position_embeddings"],
        default_theta=DEFAULT_THETA,
        has_factors="rope_freqs.weight" in names,
    )
    return with_rope(sizes, rope) | {"is_tied": "output.weight" not in names}


def with_rope(sizes: dict[str, Any], rope: RopeConfig) -> dict[str, Any]:
    """Add the rotary embedding, and the positions it reaches beyond those the model was trained on."""
    reach = max(sizes["max_position_embeddings"], rope.reach)
    return sizes | {"rope": rope, "max_position_embeddings": reach}


def refuse_experts(metadata: Mapping[str, Any], architecture: str) -> None:
    experts = optional(metadata, f"{architecture}.expert_count", int, 0, where=GGUF)
    if experts:
        raise CheckpointError(
            f"{GGUF}: {architecture}.expert_count is {experts}; mixtures of experts are not supported."
        )


def hf_layer_types(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Return which layers are local by the required field `layer_types`."""
    types = require(config, "layer_types", list, minimum=num_layers, maximum=num_layers)
    unknown = [kind for kind in types if kind not in (LOCAL, GLOBAL)]
    if unknown:
        raise CheckpointError(
            f"config.json: field 'layer_types' holds {shown(unknown[0])}; allowed: {LOCAL!r}, {GLOBAL!r}."
        )
    return tuple(kind == LOCAL for kind in types)


def hf_window(config: Mapping[str, Any]) -> int:
    return require(config, "sliding_window", int, minimum=1, maximum=MAX_POSITIONS)


def hf_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields that every decoder's `config.json` has, by the names of our records."""
    refuse_quantized(config)
    sizes: dict[str, Any] = {
        "vocab_size": require(config, "vocab_size", int, minimum=1, maximum=MAX_VOCAB),
        "hidden_size": require(config, "hidden_size", int, minimum=1, maximum=MAX_HIDDEN),
        "intermediate_size": require(config, "intermediate_size", int, minimum=1, maximum=MAX_INTERMEDIATE),
        "num_layers": require(config, "num_hidden_layers", int, minimum=1, maximum=MAX_LAYERS),
        "num_heads": require(config, "num_attention_heads", int, minimum=1, maximum=MAX_HEADS),
        "max_position_embeddings": require(
            config, "max_position_embeddings", int, minimum=1, maximum=MAX_POSITIONS
        ),
        "norm_eps": require(config, "rms_norm_eps", float, minimum=MIN_EPS, maximum=1.0),
    }
    heads = sizes["num_heads"]
    sizes["num_kv_heads"] = optional(config, "num_key_value_heads", int, heads, minimum=1, maximum=MAX_HEADS)
    if config.get("head_dim") is None:
        check_divides(sizes["hidden_size"], "hidden_size", heads, "num_attention_heads")
    sizes["head_dim"] = optional(
        config, "head_dim", int, sizes["hidden_size"] // heads, minimum=2, maximum=MAX_HEAD_DIM
    )
    check_heads(sizes, "num_attention_heads", "num_key_value_heads", "head_dim")
    return sizes


def gguf_sizes(
    metadata: Mapping[str, Any], architecture: str, *, eps_key: str = RMS_EPS_KEY
) -> dict[str, Any]:
    """Read the fields that every decoder's GGUF metadata has, by the names of our records."""

    def number(key: str, maximum: int) -> int:
        return require(metadata, f"{architecture}.{key}", int, minimum=1, maximum=maximum, where=GGUF)

    sizes: dict[str, Any] = {
        "vocab_size": gguf_vocab_size(metadata, architecture),
        "hidden_size": number("embedding_length", MAX_HIDDEN),
        "intermediate_size": number("feed_forward_length", MAX_INTERMEDIATE),
        "num_layers": number("block_count", MAX_LAYERS),
        "num_heads": number("attention.head_count", MAX_HEADS),
        "max_position_embeddings": number("context_length", MAX_POSITIONS),
        "norm_eps": require(
            metadata,
            f"{architecture}.{eps_key}",
            float,
            minimum=MIN_EPS,
            maximum=1.0,
            where=GGUF,
        ),
    }
    heads, prefix = sizes["num_heads"], f"{architecture}.attention"
    sizes["num_kv_heads"] = optional(
        metadata, f"{prefix}.head_count_kv", int, heads, minimum=1, maximum=MAX_HEADS, where=GGUF
    )
    if metadata.get(f"{prefix}.key_length") is None:
        check_divides(sizes["hidden_size"], f"{architecture}.embedding_length", heads, f"{prefix}.head_count")
    sizes["head_dim"] = optional(
        metadata,
        f"{prefix}.key_length",
        int,
        sizes["hidden_size"] // heads,
        minimum=2,
        maximum=MAX_HEAD_DIM,
        where=GGUF,
    )
    value_length = optional(metadata, f"{prefix}.value_length", int, sizes["head_dim"], where=GGUF)
    if value_length != sizes["head_dim"]:
        raise CheckpointError(
            f"{GGUF}: {prefix}.value_length is {value_length} and {prefix}.key_length {sizes['head_dim']}; "
            "heads whose keys and values differ in size are not supported."
        )
    check_heads(sizes, f"{prefix}.head_count", f"{prefix}.head_count_kv", f"{prefix}.key_length")
    return sizes


def gguf_vocab_size(metadata: Mapping[str, Any], architecture: str) -> int:
    """Return `<architecture>.vocab_size`, or the number of the tokenizer's tokens where it is absent."""
    key = f"{architecture}.vocab_size"
    tokens = metadata.get("tokenizer.ggml.tokens")
    if metadata.get(key) is None and isinstance(tokens, list) and 1 <= len(tokens) <= MAX_VOCAB:
        return len(tokens)
    return require(metadata, key, int, minimum=1, maximum=MAX_VOCAB, where=GGUF)


def check_divides(total: int, total_name: str, part: int, part_name: str) -> None:
    if total % part:
        raise CheckpointError(f"{total_name} is {total}, which {part_name} {part} does not divide.")


def check_heads(sizes: Mapping[str, Any], heads_name: str, kv_name: str, dim_name: str) -> None:
    """Raise CheckpointError unless kv heads divide the heads and the head size is even (rotary pairs)."""
    check_divides(sizes["num_heads"], heads_name, sizes["num_kv_heads"], kv_name)
    if sizes["head_dim"] % 2:
        raise CheckpointError(f"{dim_name} is {sizes['head_dim']}; rotary pairs need an even number.")


def hf_activation(config: Mapping[str, Any], key: str, known: Iterable[str] = ACTIVATIONS) -> str:
    """Return the activation's name; CheckpointError, with the valid names, for one we do not have."""
    name = require(config, key, str)
    if name not in known:
        raise CheckpointError(
            f"config.json: field {key!r} is {shown(name)}; supported: {', '.join(known)}."
            f"{nearest(name, known)}"
        )
    return name


def refuse_quantized(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"config.json: field 'quantization_config' asks for {method!r}, which is not supported; "
            "use the unquantised checkpoint, or a GGUF file."
        )
