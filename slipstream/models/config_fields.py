"""Which fields do decoder configurations share, and what may they hold?

Invariant: every number is checked against a range, and every pair that must fit is checked, before a model
is built; the message names the field. Bounds are far above any published model and far below overflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.checkpoint.fields import optional, require
from slipstream.core.errors import CheckpointError, nearest
from slipstream.layers.mlp import ACTIVATIONS

MAX_HIDDEN = 1 << 17
MAX_INTERMEDIATE = 1 << 20
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 1024
MAX_VOCAB = 1 << 23
MAX_POSITIONS = 1 << 28
MIN_EPS = 1e-15
GGUF = "GGUF metadata"


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


def gguf_sizes(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
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
            f"{architecture}.attention.layer_norm_rms_epsilon",
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


def hf_activation(config: Mapping[str, Any], key: str) -> str:
    """Return the activation's name; CheckpointError, with the valid names, for one we do not have."""
    name = require(config, key, str)
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: field {key!r} is {name!r}; supported: {', '.join(ACTIVATIONS)}."
            f"{nearest(name, ACTIVATIONS)}"
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
