"""What does `/metrics` say? Prometheus families with names and buckets that people know, under our prefix.

Nothing is counted twice: times and tokens come from the outputs of each API worker (`engine.request_counts`),
queue and cache from the engine's last heartbeat, so a scrape never waits for the engine. Several API workers
add up in `worker_counts`.
Invariant: a client cannot make a series. Labels are the served model's name, the routes of the application,
known methods, statuses and finish reasons.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from slipstream import __version__
from slipstream.engine.health import Health
from slipstream.engine.request_counts import Histogram
from slipstream.engine.service import EngineInfo
from slipstream.serve.context import ServeContext
from slipstream.serve.worker_counts import CountsFolder, Publisher, WorkerCounts

PREFIX = "slipstream:"
UNMATCHED = "unmatched"
OTHER = "other"
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
FINISH_REASONS = ("stop", "length", "cancelled", "timeout", "error")

# Attribute of RequestCounts -> (name, help).
HISTOGRAMS = {
    "ttft": ("time_to_first_token_seconds", "From a request's arrival to its first token."),
    "itl": ("inter_token_latency_seconds", "Between two tokens of one output."),
    "e2e": ("e2e_request_latency_seconds", "From a request's arrival to its end."),
    "queue": ("request_queue_time_seconds", "From a request's arrival to the first step it ran in."),
    "prefill": ("request_prefill_time_seconds", "From the first step a request ran in to its first token."),
    "decode": ("request_decode_time_seconds", "From a request's first token to its last."),
}
# Key of the engine's statistics -> (name, help).
ENGINE_COUNTERS = {
    "num_preemptions": ("num_preemptions", "Requests that lost their pages and started again."),
    "num_queried_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "num_cached_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "executed_tokens": ("executed_tokens", "Tokens that ran through the model."),
    "num_plans": ("engine_steps", "Steps planned."),
    "num_dropped_frames": ("dropped_frames", "Messages between processes that were malformed and dropped."),
}
ENGINE_GAUGES = {
    "num_running": ("num_requests_running", "Requests that the engine runs."),
    "num_waiting": ("num_requests_waiting", "Requests that wait for a place in the engine."),
    "kv_cache_usage": ("kv_cache_usage_perc", "Share of the KV cache's pages in use, from 0 to 1."),
}
# Attribute of WorkerCounts -> (name, help).
ADMISSION_GAUGES = {
    "num_held_requests": ("num_requests_admitted", "Requests that the server holds, running or waiting."),
    "num_held_tokens": ("num_tokens_admitted", "Prompt tokens of the requests that the server holds."),
    "max_held_requests": ("max_requests_admitted", "Requests beyond which the server answers 429."),
    "max_held_tokens": ("max_tokens_admitted", "Prompt tokens beyond which the server answers 429."),
}


class ServeMetrics:
    """One API worker's metrics. With `folder`, those of all workers that share it."""

    def __init__(self, context: ServeContext, *, folder: Path | None = None) -> None:
        self._context = context
        self._model = context.model_names[0] if context.model_names else ""
        self._http: dict[str, int] = {}
        self._folder = None if folder is None else CountsFolder(folder)
        self._publisher = None if self._folder is None else Publisher(self._folder, self.own_counts)
        # A registry of its own, so that two applications in one process do not meet.
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Families(self))

    def count_http(self, scope: Any, status: int) -> None:
        """Count one answer. `scope` is the request's, after the application has matched its route."""
        route = getattr(scope.get("route"), "path", UNMATCHED)
        method = scope.get("method", OTHER)
        key = f"{route} {method if method in METHODS else OTHER} {status}"
        self._http[key] = self._http.get(key, 0) + 1

    def own_counts(self) -> WorkerCounts:
        """Return this worker's numbers of now, a copy."""
        counts = WorkerCounts(http=dict(self._http))
        context = self._context
        if context.has_service:
            counts.requests.merge(context.service.counts)
        admission = context.admission
        if admission is not None:
            counts.num_refused = admission.num_refused
            counts.num_held_requests = admission.num_requests
            counts.num_held_tokens = admission.num_tokens
            counts.max_held_requests = admission.bounds.max_requests
            counts.max_held_tokens = admission.bounds.max_tokens
        return counts

    def total_counts(self) -> WorkerCounts:
        own = self.own_counts()
        return own if self._folder is None else self._folder.total(own)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the exposition and its content type, in the format that `accept` prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()

    def families(self) -> Iterator[Metric]:
        """Yield everything, of one moment."""
        label = [self._model]
        counts = self.total_counts()
        yield from _request_families(counts, label)
        yield from _http_families(counts)
        for attribute, (name, help) in ADMISSION_GAUGES.items():
            yield _gauge(name, help, getattr(counts, attribute), label)
        yield from self._engine_families(label)

    def _engine_families(self, label: list[str]) -> Iterator[Metric]:
        context = self._context
        stats: dict[str, Any] = {}
        health = Health("stopped")
        if context.has_service:
            stats, health = context.service.client.last_stats(), context.service.health()
            yield _build_info(context.service.info, self._model)
        is_up = health.state in ("ready", "asleep")
        yield _gauge("engine_up", "1 while the engine makes progress, 0 if not.", is_up, label)
        yield _gauge("engine_asleep", "1 while the engine sleeps.", health.state == "asleep", label)
        for key, (name, help) in ENGINE_COUNTERS.items():
            yield _counter(name, help, stats.get(key, 0), label)
        for key, (name, help) in ENGINE_GAUGES.items():
            # What a stopped engine last said is no longer so.
            yield _gauge(name, help, stats.get(key, 0) if is_up else 0, label)


class _Families(Collector):
    def __init__(self, metrics: ServeMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.families()


def _gauge(name: str, help: str, value: float, label: list[str]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, help, labels=["model_name"])
    family.add_metric(label, float(value))
    return family


def _counter(name: str, help: str, value: float, label: list[str]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, help, labels=["model_name"])
    family.add_metric(label, float(value))
    return family


def _request_families(counts: WorkerCounts, label: list[str]) -> Iterator[Metric]:
    requests = counts.requests
    for attribute, (name, help) in HISTOGRAMS.items():
        family = HistogramMetricFamily(PREFIX + name, help, labels=["model_name"])
        histogram: Histogram = getattr(requests, attribute)
        family.add_metric(label, _buckets(histogram), histogram.total)
        yield family
    yield _counter("prompt_tokens", "Tokens of prompts.", requests.num_prompt_tokens, label)
    yield _counter("generation_tokens", "Tokens generated.", requests.num_generation_tokens, label)
    yield _counter("requests_refused", "Requests refused for want of room.", counts.num_refused, label)
    finished = CounterMetricFamily(
        PREFIX + "request_success",
        "Outputs that ended, by how.",
        labels=["model_name", "finished_reason"],
    )
    for reason in FINISH_REASONS:
        finished.add_metric([*label, reason], requests.finished.get(reason, 0))
    yield finished


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return cumulative counts by upper bound."""
    found: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += count
        found.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
    return found


def _http_families(counts: WorkerCounts) -> Iterator[Metric]:
    family = CounterMetricFamily(
        PREFIX + "http_requests",
        "Answers by route, method and status.",
        labels=["route", "method", "status"],
    )
    for key, count in sorted(counts.http.items()):
        family.add_metric(key.rsplit(" ", 2), count)
    yield family


def _build_info(info: EngineInfo, model: str) -> Metric:
    """Name the model as clients do: where it lies on this machine is nobody's business."""
    names = ["version", "model_name", "device", "dtype", "quantization"]
    family = GaugeMetricFamily(PREFIX + "build_info", "What runs here.", labels=names)
    family.add_metric([__version__, model, info.device, info.dtype, info.quantization], 1.0)
    return family


def add_routes(app: FastAPI, context: ServeContext) -> None:
    @app.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        """Prometheus metrics."""
        accept = request.headers.get("accept", "")
        body, content_type = await asyncio.to_thread(context.metrics.render, accept)
        return Response(body, headers={"Content-Type": content_type})
