"""What did the user say about the engine, and is it served? `EngineConfig` composes the rooms' sections.

Two stages: `EngineConfig` may hold "auto" and None; `resolve` (in `engine.resolution`) leaves nothing open.
A known argument whose feature is not served yet is refused by name here, never ignored.
"""

from __future__ import annotations

import enum
from typing import Any

from slipstream.cache.config import KvCacheConfig
from slipstream.core.errors import ConfigError, UnsupportedError, nearest
from slipstream.core.option_types import check_types
from slipstream.core.options import options
from slipstream.engine.graph_config import CudaGraphConfig
from slipstream.quant.registry import SCHEMES


class CapacitySchedulerPolicy(enum.Enum):
    """When is a request admitted?

    MAX_UTILIZATION admits what fits now and preempts when pages run out. GUARANTEED_NO_EVICT admits only what
    fits beside every running request at its longest, and never preempts. STATIC_BATCH does so too, and admits
    only into an empty engine.
    """

    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    STATIC_BATCH = "STATIC_BATCH"


class ContextChunkingPolicy(enum.Enum):
    """How is a step's token budget shared among prompts?

    FIRST_COME_FIRST_SERVED: the oldest first. EQUAL_PROGRESS: the same for each, so that short prompts do not
    wait behind a long one.
    """

    FIRST_COME_FIRST_SERVED = "FIRST_COME_FIRST_SERVED"
    EQUAL_PROGRESS = "EQUAL_PROGRESS"


MAX_DECODE_STRETCH = 1000.0


@options()
class SchedulerConfig:
    """Policies of the scheduler, as members of their enum or by name.

    Requests wait in the order of (priority, arrival); `waiting_queue_policy` and `dynamic_batch_config` take
    no other values. With `max_decode_stretch` a step that also runs prompts takes at most about so many times
    as long as its decoding rows alone, so that streams stay fluent (longer where more prompts wait than rows
    decode); None lets prompts fill a step.
    """

    capacity_scheduler_policy: CapacitySchedulerPolicy | str = CapacitySchedulerPolicy.MAX_UTILIZATION
    context_chunking_policy: ContextChunkingPolicy | str = ContextChunkingPolicy.FIRST_COME_FIRST_SERVED
    waiting_queue_policy: str = "fcfs"
    dynamic_batch_config: Any = None
    max_decode_stretch: float | None = None

    @property
    def chunking_policy(self) -> str:
        return _policy_name(self, "context_chunking_policy", ContextChunkingPolicy)

    @property
    def capacity_policy(self) -> str:
        return _policy_name(self, "capacity_scheduler_policy", CapacitySchedulerPolicy)

    def __post_init__(self) -> None:
        _policy_name(self, "capacity_scheduler_policy", CapacitySchedulerPolicy)
        _policy_name(self, "context_chunking_policy", ContextChunkingPolicy)
        if self.waiting_queue_policy != "fcfs":
            raise UnsupportedError(
                f"SchedulerConfig(waiting_queue_policy={self.waiting_queue_policy!r}) is not served by this "
                "version; use 'fcfs'."
            )
        if self.dynamic_batch_config is not None:
            raise UnsupportedError("SchedulerConfig(dynamic_batch_config=...) is not served; leave it unset.")
        check_types(self)
        stretch = self.max_decode_stretch
        if stretch is not None and not 1.0 < stretch <= MAX_DECODE_STRETCH:
            raise ConfigError(
                f"SchedulerConfig(max_decode_stretch={stretch!r}) must be above 1 and at most "
                f"{MAX_DECODE_STRETCH:g}, or None for no bound."
            )


def _policy_name(config: SchedulerConfig, name: str, kind: type[enum.Enum]) -> str:
    """Return the name of a policy, given as a member or by name; refuse an unknown one."""
    value = getattr(config, name)
    label = value.value if isinstance(value, kind) else value
    valid: list[str] = [member.value for member in kind]
    if label not in valid:
        raise ConfigError(
            f"SchedulerConfig({name}={label!r}) is unknown; valid: {', '.join(valid)}."
            + nearest(str(label), valid)
        )
    return label


@options()
class EngineConfig:
    """Everything `LLM(...)` accepts, as given."""

    model: Any
    tokenizer: Any = None
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    revision: str | None = None
    load_format: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    moe_expert_parallel_size: int | None = None
    moe_tensor_parallel_size: int | None = None
    enable_attention_dp: bool = False
    kv_cache_config: KvCacheConfig | None = None
    scheduler_config: SchedulerConfig | None = None
    cuda_graph_config: CudaGraphConfig | None = None
    torch_compile_config: Any = None
    quant_config: Any = None
    speculative_config: Any = None
    enable_lora: bool = False
    lora_config: Any = None
    guided_decoding_backend: str | None = None
    enable_chunked_prefill: bool = True
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    max_beam_width: int | None = None
    attn_backend: str = "auto"
    sampler_backend: str = "auto"
    disable_overlap_scheduler: bool | None = None
    stream_interval: int = 1
    batch_invariant: bool = False
    seed: int | None = None
    device: str = "auto"
    enforce_eager: bool | None = None
    gpu_memory_utilization: float | None = None

    def __post_init__(self) -> None:
        for name, advice in _NOT_SERVED.items():
            value, default = getattr(self, name), getattr(EngineConfig, name)
            # `is`, since True == 1 and both are someone's default.
            if value is not None and value is not default:
                raise UnsupportedError(f"{name}={value!r} is not served by this version; {advice}.")
        for name, valid in _CHOICES.items():
            value = getattr(self, name)
            if value not in valid:
                raise ConfigError(
                    f"{name}={value!r} is unknown; valid: {', '.join(valid)}.{nearest(str(value), valid)}"
                )
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len", "max_beam_width", "stream_interval"):
            _require_count(name, getattr(self, name))
        if self.quant_config is not None and not isinstance(self.quant_config, str):
            raise UnsupportedError(
                f"quant_config={self.quant_config!r} is not served by this version; name a scheme, as in "
                f"quantization='int8' (valid: {', '.join(SCHEMES.names())})."
            )
        if self.quant_config is not None:
            SCHEMES.get(self.quant_config)
        _require_section("kv_cache_config", self.kv_cache_config, KvCacheConfig)
        _require_section("scheduler_config", self.scheduler_config, SchedulerConfig)
        _require_section("cuda_graph_config", self.cuda_graph_config, CudaGraphConfig)
        check_types(self)
        scheduling = self.scheduler_config or SchedulerConfig()
        if scheduling.chunking_policy == "EQUAL_PROGRESS" and not self.enable_chunked_prefill:
            raise ConfigError(
                "context_chunking_policy=EQUAL_PROGRESS shares a step among chunks of prompts, and "
                "enable_chunked_prefill=False makes none; leave one of the two out."
            )
        if scheduling.max_decode_stretch is not None and not self.enable_chunked_prefill:
            raise ConfigError(
                "max_decode_stretch bounds the chunks of prompts, and enable_chunked_prefill=False makes "
                "none; leave one of the two out."
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must be from 0 to 2**63 - 1, or None for fresh randomness.")
        if self.gpu_memory_utilization is not None and not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization={self.gpu_memory_utilization} must be in (0, 1].")


_NOT_SERVED = {
    "trust_remote_code": "code from model repositories is never run",
    "tensor_parallel_size": "use one device",
    "pipeline_parallel_size": "use one device",
    "context_parallel_size": "use one device",
    "moe_expert_parallel_size": "leave it unset",
    "moe_tensor_parallel_size": "leave it unset",
    "enable_attention_dp": "leave it off",
    "torch_compile_config": "nothing is compiled; leave it unset",
    "speculative_config": "leave it unset for plain decoding",
    "enable_lora": "merge the adapter into the checkpoint",
    "lora_config": "merge the adapter into the checkpoint",
    "guided_decoding_backend": "leave it unset",
}
_CHOICES = {
    "tokenizer_mode": ("auto",),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "load_format": ("auto", "safetensors", "gguf", "dummy"),
    "device": ("auto", "cpu", "cuda"),
    "sampler_backend": ("auto", "torch"),
}
_MAX_COUNT = 2**31 - 1


def _require_count(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_COUNT:
        raise ConfigError(f"{name}={value!r} must be a whole number from 1 to {_MAX_COUNT}.")


def _require_section(name: str, value: Any, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name} must be a {kind.__name__}, not {type(value).__name__}.")
