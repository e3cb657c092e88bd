"""How does a server do under several loads? Find the model, calibrate, warm up, then point after point.

Invariant: nothing of the warm-up is in the figures, and a server that cannot answer one request is an error
before anything is measured.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from slipstream.bench.measure import BenchError
from slipstream.bench.serving_client import ServingClient, Target
from slipstream.bench.serving_figures import Figures, figures_of
from slipstream.bench.serving_load import Bound, Load, run_in_loop
from slipstream.bench.serving_prompts import CALIBRATION_WORDS, IdWriter, PromptWriter, WordWriter
from slipstream.bench.serving_record import RequestRecord, ServingRequest
from slipstream.bench.serving_workload import ServingWorkload

WARM_UP_TOKENS = 8


# Told what runs now.
Notify = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingJob:
    """All that one `slipstream bench serve` measures. An empty `target.model` is asked of the server."""

    target: Target
    workload: ServingWorkload
    loads: Sequence[Load]
    bound: Bound
    num_warmups: int
    prompt_ids: int | None
    slo_s: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingResult:
    """What a job brought."""

    target: Target
    workload: dict[str, Any]
    tokens_per_word: float | None
    points: list[Figures]


def run_job(job: ServingJob, *, notify: Notify) -> ServingResult:
    """Measure every load point. Raises BenchError where the server cannot be measured."""
    return run_in_loop(_run(job, notify))


async def _run(job: ServingJob, notify: Notify) -> ServingResult:
    target = job.target
    if not target.model:
        async with ServingClient(target) as client:
            target = dataclasses.replace(target, model=await client.find_model())
    async with ServingClient(target) as client:
        writer = await make_writer(job, client)
        notify(f"warming up with {job.num_warmups} requests")
        await warm_up(job, client, writer)
        points: list[Figures] = []
        for number, load in enumerate(job.loads, start=1):
            notify(f"{load.label} ({number} of {len(job.loads)})")
            sent = await load.run(client, job.workload.requests(writer, point=number), job.bound)
            points.append(figures_of(load.label, sent, slo_s=job.slo_s))
    per_word = writer.tokens_per_word if isinstance(writer, WordWriter) else None
    return ServingResult(
        target=target, workload=job.workload.describe(), tokens_per_word=per_word, points=points
    )


async def make_writer(job: ServingJob, client: ServingClient) -> PromptWriter:
    """Return what writes prompts for this server; words are calibrated by two requests."""
    if job.prompt_ids is not None:
        return IdWriter(job.prompt_ids)
    counts = [await count_tokens(client, num_words) for num_words in CALIBRATION_WORDS]
    return WordWriter.calibrated((counts[0], counts[1]))


async def count_tokens(client: ServingClient, num_words: int) -> int:
    prompt = WordWriter().write(Random(num_words), num_words)
    record = await client.send(ServingRequest(prompt, output_tokens=1))
    require_complete([record], client.target)
    if record.prompt_tokens is None:
        raise BenchError(
            f"{client.target.url} sends no usage with its streams (stream_options.include_usage), so no "
            "tokens can be counted; use a server that does."
        )
    return record.prompt_tokens


async def warm_up(job: ServingJob, client: ServingClient, writer: PromptWriter) -> None:
    """Send the first requests of a workload all at once, with short answers, and require them to end well."""
    requests = first(job.workload.requests(writer, point=0), job.num_warmups)
    short = [dataclasses.replace(r, output_tokens=min(r.output_tokens, WARM_UP_TOKENS)) for r in requests]
    require_complete(await asyncio.gather(*(client.send(request) for request in short)), client.target)


def first(requests: Iterator[ServingRequest], count: int) -> list[ServingRequest]:
    return [request for _, request in zip(range(count), requests, strict=False)]


def require_complete(records: Sequence[RequestRecord], target: Target) -> None:
    """Raise BenchError for the first request that failed."""
    for record in records:
        if record.error_kind is not None:
            raise BenchError(
                f"{target.url} fails before anything is measured: {record.error_kind}: {record.error}"
            )


def require_answers(points: Sequence[Figures]) -> None:
    """Raise BenchError for a load point that no request survived: it has no figures."""
    for point in points:
        if not point.num_completed:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in point.errors.items()) or "none was sent"
            raise BenchError(f"At {point.label} no request of {point.num_requests} completed ({kinds}).")
