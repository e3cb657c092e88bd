"""Which rotary embedding does a configuration ask for? One record from every spelling in use.

transformers 5 writes `rope_parameters` (one dict, or one per layer type); older files write `rope_theta` and
`rope_scaling`; GGUF writes `rope.freq_base` and `rope.scaling.*`.
Invariant: an unsupported type raises by name; no field is read and then ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from slipstream.checkpoint.fields import optional, require
from slipstream.core.errors import CheckpointError, nearest

SUPPORTED = ("default", "linear", "llama3")
LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_THETA = 1e12
MAX_FACTOR = 1e4
MAX_POSITIONS = 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Frequencies of one rotary embedding.

    `kind` is one of `SUPPORTED`; the low and high factors and `original_positions` belong to llama3 (section
    "rope scaling" of the Llama 3.1 model card). With `has_factors` the checkpoint brings a divisor for every
    frequency.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0
    has_factors: bool = False


def rope_from_hf(
    config: Mapping[str, Any],
    *,
    max_positions: int,
    default_theta: float,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    is_scaled: bool = True,
) -> RopeConfig:
    """Read the rotary embedding of a Hugging Face configuration.

    `layer_type` names the entry where `rope_parameters` holds one per layer type. In older files the base is
    under `theta_key`, and `is_scaled` says whether `rope_scaling` applies to this layer type.
    """
    theta = optional(config, theta_key, float, default_theta, minimum=1.0, maximum=MAX_THETA)
    parameters = optional(config, "rope_parameters", dict, {})
    where = "config.json: rope_parameters"
    if parameters and layer_type is not None:
        unknown = sorted(set(parameters) - set(LAYER_TYPES))
        if unknown:
            raise CheckpointError(
                f"{where} holds {unknown}; allowed are the layer types {list(LAYER_TYPES)}."
            )
        values = optional(parameters, layer_type, dict, {}, where=where)
        return _read(values, theta, max_positions, f"{where}: {layer_type}")
    if parameters:
        return _read(parameters, theta, max_positions, where)
    scaling = optional(config, "rope_scaling", dict, {}) if is_scaled else {}
    return _read(scaling, theta, max_positions, "config.json: rope_scaling")


def rope_from_gguf(
    metadata: Mapping[str, Any],
    architecture: str,
    *,
    head_dim: int,
    default_theta: float,
    has_factors: bool = False,
) -> RopeConfig:
    """Read the rotary embedding of a GGUF file; `has_factors` says that it holds `rope_freqs.weight`."""
    where = "GGUF metadata"
    theta = optional(
        metadata,
        f"{architecture}.rope.freq_base",
        float,
        default_theta,
        minimum=1.0,
        maximum=MAX_THETA,
        where=where,
    )
    dimensions = optional(metadata, f"{architecture}.rope.dimension_count", int, head_dim, where=where)
    if dimensions != head_dim:
        raise CheckpointError(
            f"{where}: {architecture}.rope.dimension_count is {dimensions} and the head size {head_dim}; "
            "rotary embeddings over a part of the head are not supported."
        )
    kind = optional(metadata, f"{architecture}.rope.scaling.type", str, "none", where=where)
    if kind == "none":
        return RopeConfig(theta=theta, has_factors=has_factors)
    if kind != "linear":
        raise _unsupported(kind, f"{where}: {architecture}.rope.scaling.type")
    factor = require(
        metadata, f"{architecture}.rope.scaling.factor", float, minimum=1.0, maximum=MAX_FACTOR, where=where
    )
    return RopeConfig(theta=theta, kind="linear", factor=factor, has_factors=has_factors)


def _read(values: Mapping[str, Any], theta: float, max_positions: int, where: str) -> RopeConfig:
    """Read one dict of rotary parameters; `theta` is used where the dict names none."""
    kind = optional(
        values, "rope_type", str, optional(values, "type", str, "default", where=where), where=where
    )
    theta = optional(values, "rope_theta", float, theta, minimum=1.0, maximum=MAX_THETA, where=where)
    if optional(values, "partial_rotary_factor", float, 1.0, where=where) != 1.0:
        raise CheckpointError(f"{where}: partial_rotary_factor other than 1 is not supported.")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in SUPPORTED:
        raise _unsupported(kind, where)
    factor = require(values, "factor", float, minimum=1.0, maximum=MAX_FACTOR, where=where)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    low = require(values, "low_freq_factor", float, minimum=1e-3, maximum=MAX_FACTOR, where=where)
    high = require(values, "high_freq_factor", float, minimum=1e-3, maximum=MAX_FACTOR, where=where)
    if high <= low:
        raise CheckpointError(
            f"{where}: high_freq_factor is {high} and low_freq_factor {low}; the high one must be larger."
        )
    original = optional(
        values,
        "original_max_position_embeddings",
        int,
        max_positions,
        minimum=1,
        maximum=MAX_POSITIONS,
        where=where,
    )
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_positions=original,
    )


def _unsupported(kind: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: rotary embeddings of type {kind!r} are not supported; supported: "
        f"{', '.join(SUPPORTED)}.{nearest(kind, SUPPORTED)}"
    )
