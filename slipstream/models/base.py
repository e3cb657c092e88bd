"""What does the engine ask of a model, and who loops over its layers?

T tokens of the step, R rows that are sampled, D hidden size, V vocabulary.
Invariant: `run_layers` is the only loop over layers, so that pipeline cuts, weight streaming, auxiliary
hidden states, tracing and layer-by-layer checks have one place to attach to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from slipstream.checkpoint.base import Format
from slipstream.core.batch import ForwardBatch
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import UnsupportedError
from slipstream.layers.native_block import BlockList
from slipstream.models.weight_map import Place


class ModelConfig(Protocol):
    """What the engine reads of a model's configuration; a family adds its own fields."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Any:
        """Read a `config.json`. Raises CheckpointError naming the field that is missing or wrong."""
        ...

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensor_names: Iterable[str] = ()) -> Any:
        """Read GGUF metadata; `tensor_names` tell what metadata does not (an untied head, rotary factors)."""
        ...


class Model(Protocol):
    """A decoder as the engine sees it: an nn.Module whose frozen parameters are allocated when it is built.

    Its constructor is `cls(config, *, mesh, quant, dtype, device)`. No gradient is ever recorded.
    """

    Config: ClassVar[type[ModelConfig]]
    config: Any

    def cache_groups(self) -> list[CacheGroup]:
        """Return what the cache must keep, in this rank's heads; unresolved."""
        ...

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Return the [T, D] hidden states after the final norm."""
        ...

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Return [R, V] float32 scores, soft caps applied."""
        ...

    def weight_map(self, format: Format) -> dict[str, Place]:
        """Return where every tensor of a checkpoint goes."""
        ...


def run_layers(
    layers: Iterable[Callable[[Tensor, ForwardBatch], Tensor]], x_TD: Tensor, batch: ForwardBatch
) -> Tensor:
    """Run the layers in order and return the last one's [T, D].

    Raises UnsupportedError for what this version does not serve: adapters, data-parallel ranks.

    Layers with a native form may run as few calls, which replace `x_TD` in place.
    """
    if batch.adapter_idx_T is not None:
        raise UnsupportedError("This version serves no adapters: leave adapter_idx_T of the batch unset.")
    if batch.num_tokens_per_dp_rank is not None:
        raise UnsupportedError("One data-parallel rank is served: leave num_tokens_per_dp_rank unset.")
    if isinstance(layers, BlockList):
        done_TD = layers.run_natively(x_TD, batch)
        if done_TD is not None:
            return done_TD
    for layer in layers:
        x_TD = layer(x_TD, batch)
    return x_TD
