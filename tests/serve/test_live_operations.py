"""Do metrics, log and trace hold across processes? One server of two API workers and an engine of its own."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slipstream.cli.main import run_command
from slipstream.serve.metrics import PREFIX
from slipstream.trace.reading import read_trace
from slipstream.trace.timeline import timeline_of
from tests.bench.tiny_checkpoint import write_checkpoint
from tests.serve.live_server import LiveServer, live, wait_until
from tests.serve.oracle import DEADLINE_S

KEY = "secret-of-a-client"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SHARED = "a prompt that all of them begin with, "
NUM_REQUESTS = 12


@pytest.fixture
def keep_logging() -> Iterator[None]:
    """A command line sets the package's logger up for its process."""
    logger = logging.getLogger("slipstream")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = write_checkpoint(tmp_path_factory.mktemp("served") / "tiny")
    options = ("--api-workers", "2", "--log-requests", "--log-json", "--served-model-name", "tiny")
    with live(model, *options, env={"SLIPSTREAM_API_KEY": KEY}) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def asked(server: LiveServer) -> list[dict[str, Any]]:
    """Ask over a new connection each time, so that either worker may get it; returns the usages."""
    found = []
    for number in range(NUM_REQUESTS):
        body = {"model": "tiny", "prompt": f"{SHARED}{number}", "max_tokens": 5, "ignore_eos": True}
        headers = HEADERS | {"x-request-id": f"job-{number}"}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=DEADLINE_S)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"] == f"job-{number}"
        found.append(answer.json()["usage"])
    return found


def figures(server: LiveServer) -> dict[tuple[str, ...], float]:
    """Scrape whichever worker takes a new connection."""
    text = server.get("/metrics", headers=HEADERS).text
    return {
        (
            sample.name.removeprefix(PREFIX),
            *(value for _, value in sorted(sample.labels.items())),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_any_worker_tells_of_all_of_them(server: LiveServer, asked: list[dict[str, Any]]) -> None:
    tokens = sum(usage["completion_tokens"] for usage in asked)
    prompt_tokens = sum(usage["prompt_tokens"] for usage in asked)

    def is_all_told() -> bool:
        now = figures(server)
        # Each worker asks the engine for a token, with a prompt of one, before it says that it is ready.
        num_probes = now[("time_to_first_token_seconds_count", "tiny")] - NUM_REQUESTS
        return (
            now.get(("http_requests_total", "POST", "/v1/completions", "200")) == NUM_REQUESTS
            and 0 <= num_probes <= 4
            and now[("generation_tokens_total", "tiny")] == tokens + num_probes
            and now[("prompt_tokens_total", "tiny")] == prompt_tokens + num_probes
            and now[("engine_up", "tiny")] == 1
            and now[("num_requests_admitted", "tiny")] == 0
        )

    # What one worker says of the other is a second old at most; then any of them says the same.
    wait_until(is_all_told, what="workers do not add up")
    for _ in range(8):
        wait_until(is_all_told, what="workers do not add up")


def test_the_engine_s_counters_come_with_its_heartbeat(
    server: LiveServer, asked: list[dict[str, Any]]
) -> None:
    least = sum(usage["prompt_tokens"] for usage in asked)
    wait_until(
        lambda: figures(server)[("prefix_cache_queries_total", "tiny")] >= least, what="no counters came"
    )
    now = figures(server)
    assert now[("prefix_cache_hits_total", "tiny")] > 0 and now[("engine_steps_total", "tiny")] > 12
    assert now[("dropped_frames_total", "tiny")] == 0 and now[("num_requests_running", "tiny")] == 0


@pytest.mark.usefixtures("keep_logging")
def test_the_trace_crosses_from_the_engine_s_process(
    server: LiveServer, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_trace(server.url, api_key=KEY)
    lanes = timeline_of(found.trace, model=found.model).lanes[-NUM_REQUESTS:]
    assert [lane.num_prompt_tokens for lane in lanes] == [usage["prompt_tokens"] for usage in asked]
    assert all(lane.num_output_tokens == 5 and lane.outcome == "length" for lane in lanes)
    assert sum(lane.num_cached_tokens or 0 for lane in lanes) > 0
    monkeypatch.setenv("SLIPSTREAM_API_KEY", KEY)
    page = tmp_path / "trace.html"
    assert run_command(["trace", server.url, "-o", str(page)]) == 0
    assert lanes[-1].request_id in page.read_text(encoding="utf-8")


def test_every_process_logs_as_json(server: LiveServer, asked: list[dict[str, Any]]) -> None:
    """What is for people at the start stands apart."""
    said = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR)\b")
    log = [line for line in list(server.lines) if '"level"' in line or said.search(line)]
    assert len(log) >= NUM_REQUESTS and all(json.loads(line)["logger"] for line in log)


def test_r80_both_workers_log_without_text(server: LiveServer, asked: list[dict[str, Any]]) -> None:
    def entries() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in list(server.lines) if line.startswith("{")]
        return [entry for entry in found if str(entry.get("request_id", "")).startswith("job-")]

    wait_until(lambda: len(entries()) == NUM_REQUESTS, what="a request was not logged")
    assert {entry["output_tokens"] for entry in entries()} == {5}
    assert {entry["request_id"] for entry in entries()} == {f"job-{n}" for n in range(NUM_REQUESTS)}
    text = "\n".join(server.lines)
    assert SHARED.strip() not in text and KEY not in text
