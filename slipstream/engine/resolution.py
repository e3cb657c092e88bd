"""What does `EngineConfig` mean on this machine for this model? Nothing stays "auto".

`resolve` is a pure function of (configuration, model facts, device facts); each choice it makes carries its
reason, which the engine prints. What is learnt by looking at memory afterwards is `Capacity`.
"""

from __future__ import annotations

import dataclasses

from slipstream.cache.config import KvCacheConfig
from slipstream.core.errors import ConfigError, OutOfMemoryError, UnsupportedError
from slipstream.core.limits import MAX_BEAM_WIDTH
from slipstream.engine.config import EngineConfig, SchedulerConfig
from slipstream.engine.graph_config import CudaGraphConfig
from slipstream.quant.registry import SCHEMES

MIN_SEQ_LEN = 2
UNQUANTIZED = "unquantized"
# What keeps a token's bits whatever the batch, on a CPU and on a GPU.
INVARIANT = {"cpu": "float32", "cuda": "fixed_tiles"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a checkpoint says of its model: bounds, stored type ("float32", ...), whether it is quantised."""

    vocab_size: int
    max_position_embeddings: int
    dtype: str
    is_quantized: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedConfig:
    """Every choice made; `reasons` maps a choice to why."""

    device: str
    dtype: str
    quantization: str
    kv_dtype: str
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    depth: int
    enable_chunked_prefill: bool
    max_beam_width: int
    capacity_policy: str
    chunking_policy: str
    max_decode_stretch: float | None
    kv_cache: KvCacheConfig
    attn_backend: str
    gpu_memory_utilization: float | None
    batch_invariant: bool
    graph_sizes: tuple[int, ...]
    has_graph_padding: bool
    capture_budget_s: float
    seed: int | None
    reasons: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What was measured at start: pages of the pool (the null page included) and what they take, in bytes."""

    num_pages: int
    num_tokens: int
    page_bytes: int
    pool_bytes: int
    reason: str


def resolve(
    config: EngineConfig, facts: ModelFacts, *, has_cuda: bool, native_obstacle: str = ""
) -> ResolvedConfig:
    """Fill in every open choice. Raises ConfigError for one that this machine or model cannot honour.

    `native_obstacle` says why the CPU kernels cannot be had, "" where they can.
    """
    reasons: dict[str, str] = {}
    device = _device(config, has_cuda, reasons)
    if device == "cpu" and config.gpu_memory_utilization is not None:
        raise ConfigError(
            "gpu_memory_utilization is set but the device is a CPU; bound the cache with "
            "KvCacheConfig(max_tokens=...) instead."
        )
    is_gpu = device == "cuda"
    max_num_tokens = config.max_num_tokens or (8192 if is_gpu else 2048)
    max_batch_size = config.max_batch_size or min(2048 if is_gpu else 64, max_num_tokens)
    if max_batch_size > max_num_tokens:
        raise ConfigError(
            f"max_batch_size={max_batch_size} exceeds max_num_tokens={max_num_tokens}: a step gives every "
            "running request a token; raise max_num_tokens or lower max_batch_size."
        )
    quantization = _quantization(config, facts, device, native_obstacle, reasons)
    dtype = _dtype(config, facts, device, quantization, reasons)
    return ResolvedConfig(
        device=device,
        dtype=dtype,
        quantization=quantization,
        kv_dtype=_kv_dtype(config, device, dtype, quantization),
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=_max_seq_len(config, facts),
        depth=_depth(config, device, reasons),
        enable_chunked_prefill=config.enable_chunked_prefill,
        max_beam_width=_max_beam_width(config, max_batch_size),
        capacity_policy=(config.scheduler_config or SchedulerConfig()).capacity_policy,
        chunking_policy=(config.scheduler_config or SchedulerConfig()).chunking_policy,
        max_decode_stretch=(config.scheduler_config or SchedulerConfig()).max_decode_stretch,
        kv_cache=config.kv_cache_config or KvCacheConfig(),
        attn_backend=config.attn_backend,
        gpu_memory_utilization=config.gpu_memory_utilization,
        batch_invariant=config.batch_invariant,
        graph_sizes=_graph_sizes(config, device, max_batch_size),
        has_graph_padding=(config.cuda_graph_config or CudaGraphConfig()).enable_padding,
        capture_budget_s=(config.cuda_graph_config or CudaGraphConfig()).capture_budget_s,
        seed=config.seed,
        reasons=reasons,
    )


def _graph_sizes(config: EngineConfig, device: str, max_batch_size: int) -> tuple[int, ...]:
    """Return the numbers of rows whose decode step is captured; none on a CPU, or where it is turned off."""
    asked = config.cuda_graph_config
    if device == "cpu":
        if asked is not None:
            raise UnsupportedError(
                "cuda_graph_config is set but the device is a CPU, where nothing is captured; leave it unset."
            )
        return ()
    if config.enforce_eager:
        if asked is not None:
            raise ConfigError(
                "enforce_eager=True turns captured steps off, cuda_graph_config asks for them; leave one out."
            )
        return ()
    return (asked or CudaGraphConfig()).sizes(max_batch_size)


def _max_beam_width(config: EngineConfig, max_batch_size: int) -> int:
    asked = config.max_beam_width
    if asked is not None and asked > max_batch_size:
        raise ConfigError(
            f"max_beam_width={asked} exceeds max_batch_size={max_batch_size}: each beam of a request takes a "
            "row of its own; raise max_batch_size or lower max_beam_width."
        )
    return min(max_batch_size, MAX_BEAM_WIDTH) if asked is None else asked


def _device(config: EngineConfig, has_cuda: bool, reasons: dict[str, str]) -> str:
    if config.device == "cuda" and not has_cuda:
        raise ConfigError(
            "device='cuda' was asked for, but torch sees no CUDA device; install a CUDA build of torch and a "
            "driver, or use device='cpu' (or 'auto')."
        )
    if config.device != "auto":
        return config.device
    reasons["device"] = "a CUDA device is there" if has_cuda else "no CUDA device is there"
    return "cuda" if has_cuda else "cpu"


def _quantization(
    config: EngineConfig, facts: ModelFacts, device: str, native_obstacle: str, reasons: dict[str, str]
) -> str:
    """Return a row of quant.registry.SCHEMES."""
    asked = config.quant_config
    if config.batch_invariant and (asked is None or asked == INVARIANT[device]):
        return _invariant_quantization(config, facts, device, native_obstacle, reasons)
    if asked is not None and device not in SCHEMES.get(asked).capability.devices:
        raise ConfigError(f"quantization={asked!r} does not run on {device!r}; leave it unset.")
    if asked not in (None, UNQUANTIZED):
        if device != "cpu":
            raise ConfigError(f"quantization={asked!r} runs on a CPU; leave it unset on {device!r}.")
        if native_obstacle:
            raise ConfigError(f"quantization={asked!r} needs the CPU kernels: {native_obstacle}")
        if config.dtype not in ("auto", "float32"):
            raise ConfigError(
                f"quantization={asked!r} computes in float32; leave dtype='auto' instead of {config.dtype!r}."
            )
        return asked
    if asked == UNQUANTIZED or device != "cpu" or not facts.is_quantized:
        return UNQUANTIZED
    if config.dtype != "auto":
        reasons["quantization"] = f"dtype={config.dtype!r} asks for the weights as floats"
        return UNQUANTIZED
    if native_obstacle:
        reasons["quantization"] = f"plain torch, several times slower: {native_obstacle}"
        return UNQUANTIZED
    reasons["quantization"] = "the file's own types, int8 activations; dtype='float32' is exact"
    return "gguf"


def _invariant_quantization(
    config: EngineConfig, facts: ModelFacts, device: str, native_obstacle: str, reasons: dict[str, str]
) -> str:
    """Return the scheme of `batch_invariant=True`. Raises ConfigError where there is none."""
    if device != "cpu":
        reasons["quantization"] = "products of one shape, for batch_invariant=True"
        return INVARIANT[device]
    if native_obstacle:
        raise ConfigError(f"batch_invariant=True needs the CPU kernels: {native_obstacle}")
    if config.dtype not in ("auto", "float32"):
        raise ConfigError(
            f"batch_invariant=True computes in float32 on a CPU; leave dtype='auto' instead of "
            f"{config.dtype!r}."
        )
    if facts.is_quantized and config.dtype == "auto" and config.quant_config is None:
        reasons["quantization"] = "the file's own types, int8 activations: the same bits in every batch"
        return "gguf"
    reasons["quantization"] = "float32 by our own kernels, for batch_invariant=True"
    return INVARIANT[device]


def _dtype(
    config: EngineConfig, facts: ModelFacts, device: str, quantization: str, reasons: dict[str, str]
) -> str:
    if config.dtype != "auto":
        return config.dtype
    if device == "cuda":
        reasons["dtype"] = "the checkpoint's type"
        return facts.dtype if facts.dtype in ("bfloat16", "float16") else "float32"
    is_packed = quantization != UNQUANTIZED
    reasons["dtype"] = "between packed weights" if is_packed else "exact, and the fastest plain type on a CPU"
    return "float32"


def _kv_dtype(config: EngineConfig, device: str, dtype: str, quantization: str) -> str:
    asked = (config.kv_cache_config or KvCacheConfig()).dtype
    if asked == "auto":
        is_narrow = device == "cpu" and quantization not in (UNQUANTIZED, INVARIANT["cpu"])
        return "float16" if is_narrow else dtype
    if device != "cpu" and asked != dtype:
        raise UnsupportedError(
            f"KvCacheConfig(dtype={asked!r}) beside dtype={dtype!r} is served on a CPU only; leave it 'auto'."
        )
    return asked


def _depth(config: EngineConfig, device: str, reasons: dict[str, str]) -> int:
    if config.disable_overlap_scheduler is not None:
        return 1 if config.disable_overlap_scheduler else 2
    reasons["depth"] = (
        "a CPU computes inside launch" if device == "cpu" else "the host works ahead of the GPU"
    )
    return 1 if device == "cpu" else 2


def _max_seq_len(config: EngineConfig, facts: ModelFacts) -> int:
    asked, limit = config.max_seq_len, facts.max_position_embeddings
    if asked is None:
        return limit
    if not MIN_SEQ_LEN <= asked <= limit:
        raise ConfigError(
            f"max_seq_len={asked} must be from {MIN_SEQ_LEN} to {limit}, the positions this model knows."
        )
    return asked


def fit_capacity(
    resolved: ResolvedConfig,
    *,
    page_bytes: int,
    num_groups: int,
    free_bytes: int,
    total_bytes: int,
    reserved_bytes: int = 0,
) -> Capacity:
    """Turn memory settings into a number of pages.

    `free_bytes` is what is free after weights, `total_bytes` the device's memory, `reserved_bytes` what steps
    need beside the pages. Raises OutOfMemoryError with needed and free bytes where not even one full block
    per group fits.
    """
    used = total_bytes - free_bytes + reserved_bytes
    free_bytes -= reserved_bytes
    kv = resolved.kv_cache
    per_token = page_bytes * num_groups / kv.tokens_per_block
    if resolved.device == "cpu":
        budget, reason = free_bytes // 4, "a quarter of free memory"
        if kv.max_tokens is None and 8192 * per_token < budget:
            budget, reason = int(8192 * per_token), "8,192 tokens, the default on a CPU"
        elif kv.max_tokens is not None:
            budget = free_bytes
    else:
        budget, reason = int(free_bytes * kv.free_gpu_memory_fraction), "free_gpu_memory_fraction"
        if resolved.gpu_memory_utilization is not None:
            budget, reason = (
                int(total_bytes * resolved.gpu_memory_utilization) - used,
                "gpu_memory_utilization",
            )
    if kv.max_gpu_total_bytes is not None:
        asked = parse_bytes(kv.max_gpu_total_bytes)
        if asked < budget:
            budget, reason = asked, "max_gpu_total_bytes"
    blocks = max(0, budget) // (page_bytes * num_groups)
    if kv.max_tokens is not None:
        wanted = -(-kv.max_tokens // kv.tokens_per_block)
        if wanted > blocks:
            raise OutOfMemoryError(
                f"KvCacheConfig(max_tokens={kv.max_tokens}) needs {wanted * page_bytes * num_groups:,} bytes "
                f"and {max(0, budget):,} are free ({reason}); lower max_tokens."
            )
        blocks, reason = wanted, "KvCacheConfig(max_tokens)"
    if blocks < 1:
        raise OutOfMemoryError(
            f"The KV cache needs at least {page_bytes * num_groups:,} bytes (one block) and has "
            f"{max(0, budget):,} ({reason}); free memory, or lower max_num_tokens."
        )
    num_pages = 1 + blocks * num_groups
    return Capacity(
        num_pages=num_pages,
        num_tokens=blocks * kv.tokens_per_block,
        page_bytes=page_bytes,
        pool_bytes=num_pages * page_bytes,
        reason=reason,
    )


_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1024, "MI": 1024**2, "GI": 1024**3}


def parse_bytes(value: int | str) -> int:
    """Return a number of bytes from 1073741824, "40GiB", "512MB" or "2g"."""
    text = str(value).strip().upper().removesuffix("B")
    number = text.rstrip("KMGI")
    try:
        size = value if isinstance(value, int) else int(float(number) * _UNITS[text[len(number) :]])
    except (KeyError, ValueError, OverflowError):
        size = -1
    if size < 0:
        raise ConfigError(f"{value!r} is not a size; write bytes or e.g. '512MiB', '40GiB'.")
    return size
