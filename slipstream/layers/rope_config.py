"""Which rotary embedding does a configuration ask for? One record from every spelling in use.

transformers 5 writes `rope_parameters` (one dict, or one per layer type); older files write `rope_theta` and
`rope_scaling`; GGUF writes `rope.freq_base` and `rope.scaling.*`.
Invariant: an unsupported type raises by name; no field is read and then ignored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from slipstream.checkpoint.fields import optional, require
from slipstream.core.errors import CheckpointError, nearest

SUPPORTED = ("default", "linear", "llama3", "yarn")
GGUF_SUPPORTED = ("linear", "yarn")
GGUF_YARN_KEYS = (
    "attn_factor",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_log_multiplier",
)
LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_THETA = 1e12
MAX_FACTOR = 1e4
MAX_POSITIONS = 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Frequencies of one rotary embedding.

    `kind` is one of `SUPPORTED`; the low and high factors belong to llama3 (section "rope scaling" of the
    Llama 3.1 model card), the betas (turns over `original_positions` below and above which a frequency is
    scaled and kept), whether the ramp between them ends at whole indices, and `attention_factor` to yarn.
    With `has_factors` the checkpoint brings a divisor for every frequency. `rotary_dim` elements at the front
    of a head turn, all where it is 0.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    is_ramp_whole: bool = True
    attention_factor: float = 1.0
    has_factors: bool = False
    rotary_dim: int = 0

    @property
    def reach(self) -> int:
        """The positions that scaling extends the original ones to, 0 where the kind does not say."""
        return int(self.factor * self.original_positions) if self.kind == "yarn" else 0


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
    max_positions: int,
    default_theta: float,
    has_factors: bool = False,
    is_partial: bool = False,
) -> RopeConfig:
    """Read the rotary embedding of a GGUF file; `has_factors` says that it holds `rope_freqs.weight`.

    With `is_partial` it may turn a part of the head.
    """
    where, prefix = "GGUF metadata", f"{architecture}.rope"
    theta = optional(
        metadata, f"{prefix}.freq_base", float, default_theta, minimum=1.0, maximum=MAX_THETA, where=where
    )
    key = f"{prefix}.dimension_count"
    rotary_dim = optional(metadata, key, int, head_dim, minimum=1, maximum=head_dim, where=where)
    if rotary_dim % 2 or (rotary_dim != head_dim and not is_partial):
        raise CheckpointError(
            f"{where}: {key} is {rotary_dim} and the head size {head_dim}; this architecture turns "
            f"{'an even number of elements' if is_partial else 'the whole head'}."
        )
    rotary_dim = 0 if rotary_dim == head_dim else rotary_dim
    _refuse_tuned_yarn(metadata, prefix)
    kind = optional(metadata, f"{prefix}.scaling.type", str, "none", where=where)
    if kind == "none":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim, has_factors=has_factors)
    if kind not in GGUF_SUPPORTED or rotary_dim:
        raise _unsupported(kind, f"{where}: {prefix}.scaling.type")
    factor = require(
        metadata, f"{prefix}.scaling.factor", float, minimum=1.0, maximum=MAX_FACTOR, where=where
    )
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor, has_factors=has_factors)
    original = optional(
        metadata,
        f"{prefix}.scaling.original_context_length",
        int,
        max_positions,
        minimum=1,
        maximum=MAX_POSITIONS,
        where=where,
    )
    yarn = _yarn({}, theta, factor, original, where)
    return dataclasses.replace(yarn, has_factors=has_factors)


def _refuse_tuned_yarn(metadata: Mapping[str, Any], prefix: str) -> None:
    tuned = [f"{prefix}.scaling.{name}" for name in GGUF_YARN_KEYS]
    given = [key for key in tuned if metadata.get(key) is not None]
    if given:
        raise CheckpointError(
            f"GGUF metadata: {given[0]} is set; only yarn's own ramp and attention factor are supported. "
            "Use the original folder (with config.json)."
        )


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
    original = optional(
        values,
        "original_max_position_embeddings",
        int,
        max_positions,
        minimum=1,
        maximum=MAX_POSITIONS,
        where=where,
    )
    make = _yarn if kind == "yarn" else _llama3
    return make(values, theta, factor, original, where)


def _llama3(values: Mapping[str, Any], theta: float, factor: float, original: int, where: str) -> RopeConfig:
    low = require(values, "low_freq_factor", float, minimum=1e-3, maximum=MAX_FACTOR, where=where)
    high = require(values, "high_freq_factor", float, minimum=1e-3, maximum=MAX_FACTOR, where=where)
    if high <= low:
        raise CheckpointError(
            f"{where}: high_freq_factor is {high} and low_freq_factor {low}; the high one must be larger."
        )
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_positions=original,
    )


def _yarn(values: Mapping[str, Any], theta: float, factor: float, original: int, where: str) -> RopeConfig:
    if theta <= 1.0:
        raise CheckpointError(f"{where}: rope_theta is {theta}; yarn needs one above 1.")
    slow = optional(values, "beta_slow", float, 1.0, minimum=1e-3, maximum=MAX_FACTOR, where=where)
    fast = optional(values, "beta_fast", float, 32.0, minimum=1e-3, maximum=MAX_FACTOR, where=where)
    if fast < slow:
        raise CheckpointError(
            f"{where}: beta_fast is {fast} and beta_slow {slow}; the fast one must not be smaller."
        )
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_positions=original,
        beta_slow=slow,
        beta_fast=fast,
        is_ramp_whole=optional(values, "truncate", bool, True, where=where),
        attention_factor=_yarn_attention_factor(values, factor, where),
    )


def _yarn_attention_factor(values: Mapping[str, Any], factor: float, where: str) -> float:
    """Return what cosines and sines are multiplied by: as given, or by the paper's rule from the factor."""

    def number(key: str) -> float:
        return optional(values, key, float, 0.0, minimum=0.0, maximum=MAX_FACTOR, where=where)

    if values.get("attention_factor") is not None:
        return require(values, "attention_factor", float, minimum=1e-3, maximum=MAX_FACTOR, where=where)
    log = 0.1 * math.log(factor)
    above, below = number("mscale"), number("mscale_all_dim")
    return (above * log + 1.0) / (below * log + 1.0) if above and below else log + 1.0


def _unsupported(kind: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: rotary embeddings of type {kind!r} are not supported; supported: "
        f"{', '.join(SUPPORTED)}.{nearest(kind, SUPPORTED)}"
    )
