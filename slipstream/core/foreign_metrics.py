"""Which metrics do TensorRT-LLM, vLLM and SGLang export, and what are they called here? Rows alone.

Names are as Prometheus shows them. Sources: vLLM's "Production Metrics", SGLang's "Production Metrics" and
TensorRT-LLM's metrics collector, 2025 to 2026. After a change: `python tools/write_migrating.py`.
"""

from __future__ import annotations

from slipstream.core.foreign_names import ForeignName, alias, refused

_OURS = "slipstream:"


def _row(name: str, engine: str, ours: str, note: str = "") -> ForeignName:
    return alias(name, engine, None, _OURS + ours, note)


def _of(engine: str, prefix: str, ours: str, note: str = "") -> ForeignName:
    """A name that differs in its prefix alone."""
    return _row(prefix + ours, engine, ours, note)


# The same in vLLM and, but for the prefix, in TensorRT-LLM.
_SHARED = (
    "time_to_first_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "num_requests_running",
    "num_requests_waiting",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
)
_HIT_RATE = "divide `slipstream:prefix_cache_hits_total` by `slipstream:prefix_cache_queries_total`"
_RATE = "take `rate(slipstream:generation_tokens_total[1m])`"

METRICS: tuple[ForeignName, ...] = (
    *(_of("V", "vllm:", name) for name in _SHARED),
    _of("V", "vllm:", "inter_token_latency_seconds"),
    _of("V", "vllm:", "kv_cache_usage_perc"),
    _of("V", "vllm:", "prefix_cache_queries_total"),
    _of("V", "vllm:", "prefix_cache_hits_total"),
    _of("V", "vllm:", "num_preemptions_total"),
    _row("vllm:gpu_cache_usage_perc", "V", "kv_cache_usage_perc"),
    _row("vllm:time_per_output_token_seconds", "V", "inter_token_latency_seconds"),
    refused(
        "vllm:request_inference_time_seconds",
        "V",
        None,
        "add `slipstream:request_prefill_time_seconds` and `slipstream:request_decode_time_seconds`",
    ),
    *(_of("T", "trtllm_", name) for name in _SHARED),
    _row("trtllm_time_per_output_token_seconds", "T", "inter_token_latency_seconds", "of each token"),
    _row("trtllm_kv_cache_utilization", "T", "kv_cache_usage_perc"),
    refused("trtllm_kv_cache_hit_rate", "T", None, _HIT_RATE),
    _of("S", "sglang:", "prompt_tokens_total"),
    _of("S", "sglang:", "generation_tokens_total"),
    _of("S", "sglang:", "time_to_first_token_seconds"),
    _of("S", "sglang:", "inter_token_latency_seconds"),
    _of("S", "sglang:", "e2e_request_latency_seconds"),
    _row("sglang:num_running_reqs", "S", "num_requests_running"),
    _row("sglang:num_queue_reqs", "S", "num_requests_waiting"),
    _row("sglang:token_usage", "S", "kv_cache_usage_perc"),
    _row("sglang:cached_tokens_total", "S", "prefix_cache_hits_total"),
    refused("sglang:cache_hit_rate", "S", None, _HIT_RATE),
    refused("sglang:gen_throughput", "S", None, _RATE),
)
