"""Slipstream: LLM inference from a checkpoint to tokens. Importing it loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "slipstream.llm",
    "AsyncLLM": "slipstream.llm",
    "SamplingParams": "slipstream.core.sampling_params",
    "RequestOutput": "slipstream.core.outputs",
    "CompletionOutput": "slipstream.core.outputs",
    "EmbeddingOutput": "slipstream.core.outputs",
    "RequestError": "slipstream.core.errors",
    "KvCacheConfig": "slipstream.cache.config",
    "KvCacheRetentionConfig": "slipstream.core.kv_retention",
    "TokenRangeRetentionConfig": "slipstream.core.kv_retention",
    "SchedulerConfig": "slipstream.engine.config",
    "CudaGraphConfig": "slipstream.engine.graph_config",
    "CapacitySchedulerPolicy": "slipstream.engine.config",
    "ContextChunkingPolicy": "slipstream.engine.config",
}
__all__ = [*_EXPORTS, "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from slipstream.cache.config import KvCacheConfig as KvCacheConfig
    from slipstream.core.errors import RequestError as RequestError
    from slipstream.core.kv_retention import KvCacheRetentionConfig as KvCacheRetentionConfig
    from slipstream.core.kv_retention import TokenRangeRetentionConfig as TokenRangeRetentionConfig
    from slipstream.core.outputs import CompletionOutput as CompletionOutput
    from slipstream.core.outputs import EmbeddingOutput as EmbeddingOutput
    from slipstream.core.outputs import RequestOutput as RequestOutput
    from slipstream.core.sampling_params import SamplingParams as SamplingParams
    from slipstream.engine.config import CapacitySchedulerPolicy as CapacitySchedulerPolicy
    from slipstream.engine.config import ContextChunkingPolicy as ContextChunkingPolicy
    from slipstream.engine.config import SchedulerConfig as SchedulerConfig
    from slipstream.engine.graph_config import CudaGraphConfig as CudaGraphConfig
    from slipstream.llm import LLM as LLM
    from slipstream.llm import AsyncLLM as AsyncLLM


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'slipstream' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
