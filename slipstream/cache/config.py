"""What may a user say about the KV cache? Names as in TensorRT-LLM."""

from __future__ import annotations

from typing import Any, cast

from slipstream.core.errors import ConfigError, UnsupportedError
from slipstream.core.option_types import check_types
from slipstream.core.options import options


@options()
class KvCacheConfig:
    """Size and reuse of the KV cache.

    `max_tokens` bounds the pool (None: by memory). `free_gpu_memory_fraction` is the share of what is free
    after weights and activations. `max_gpu_total_bytes` bounds the pool in bytes ("40GiB" or an int).
    `enable_block_reuse` shares whole blocks of equal prefixes, `enable_partial_reuse` copies the part of a
    block that matches. `dtype` is the type of keys and values; "auto" is the activations' type, and float16
    beside packed weights on a CPU. `event_buffer_max_size` keeps that many events of what becomes findable
    and what is forgotten, for `LLM.get_kv_cache_events` (0: none).
    """

    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    tokens_per_block: int = 32
    max_tokens: int | None = None
    free_gpu_memory_fraction: float = 0.9
    max_gpu_total_bytes: int | str | None = None
    dtype: str = "auto"
    max_attention_window: Any = None
    sink_token_length: Any = None
    host_cache_size: Any = None
    secondary_offload_min_priority: Any = None
    event_buffer_max_size: int = 0

    def __post_init__(self) -> None:
        for name in _LATER:
            if getattr(self, name) is not None:
                raise UnsupportedError(
                    f"KvCacheConfig({name}=...) is not served by this version; leave it unset."
                )
        if not self.copy_on_partial_reuse:
            raise UnsupportedError(
                "KvCacheConfig(copy_on_partial_reuse=False) would write to a page that others may read; "
                "use enable_partial_reuse=False to share whole blocks only."
            )
        if self.dtype not in KV_DTYPES:
            raise UnsupportedError(
                f"KvCacheConfig(dtype={self.dtype!r}) is not served by this version; valid: "
                f"{', '.join(KV_DTYPES)}."
            )
        check_types(self, owner=type(self).__name__)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"KvCacheConfig(max_tokens={self.max_tokens}) must be at least 1.")
        if not 0.0 < self.free_gpu_memory_fraction <= 1.0:
            raise ConfigError(
                f"KvCacheConfig(free_gpu_memory_fraction={self.free_gpu_memory_fraction}) must be in (0, 1]."
            )
        size = cast(Any, self.event_buffer_max_size)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_EVENTS:
            raise ConfigError(
                f"KvCacheConfig(event_buffer_max_size={size!r}) must be a whole number from 0 (no events) to "
                f"{MAX_EVENTS}."
            )


KV_DTYPES = ("auto", "float16", "bfloat16", "float32")
MAX_EVENTS = 2**20
_LATER = (
    "max_attention_window",
    "sink_token_length",
    "host_cache_size",
    "secondary_offload_min_priority",
)
