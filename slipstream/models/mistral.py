"""How does Mistral run? As Llama does, over a window where its configuration names one.

Its GGUF files carry the architecture "llama" and are served by that class; read here, they mean the same.
Source: Jiang et al., Mistral 7B, arXiv 2310.06825.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from slipstream.core.errors import CheckpointError
from slipstream.models.config_fields import hf_decoder, hf_window
from slipstream.models.llama import Llama, LlamaConfig, every_layer_local


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MistralConfig(LlamaConfig):
    """Sizes of a Mistral model; without a window every layer sees all positions."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> MistralConfig:
        """Read a `config.json`. Raises CheckpointError naming the field that is missing or wrong."""
        if "sliding_window" not in config:
            # Left out, it means 4096 to transformers and nothing to others: too different to guess.
            raise CheckpointError(
                "config.json: field 'sliding_window' is missing; needed: a number of positions, or null for "
                "a model without a window. Add it or use a complete checkpoint."
            )
        if config.get("layer_types") is not None:
            raise CheckpointError(
                "config.json: field 'layer_types' is set; the window of this architecture holds for all "
                "layers. Remove the field, or use the checkpoint's own configuration."
            )
        fields = hf_decoder(config)
        window = 0 if config["sliding_window"] is None else hf_window(config)
        return cls(**fields, **every_layer_local(window, fields["num_layers"]))


class Mistral(Llama):
    """A Llama whose layers may all see a window."""

    Config = MistralConfig
