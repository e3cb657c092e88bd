"""Do metrics, logs, spans and traces of a real server agree with what was asked of it?"""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slipstream.core.errors import EngineError
from slipstream.core.log_lines import JsonLines
from slipstream.engine.service import EngineService
from slipstream.serve.log_format import current_request_id
from slipstream.serve.metrics import PREFIX, ServeMetrics
from slipstream.serve.settings import ApiKey, ServeSettings
from slipstream.trace.reading import decode_trace, read_trace
from slipstream.trace.timeline import timeline_of
from tests.serve.tiny_server import RunningServer, checked_error, serving

SECRET = "the launch code\nforged line"
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": [5, 6, 7, 8],
    "max_tokens": 6,
    "ignore_eos": True,
    "temperature": 0,
}


class KeptLines(logging.Handler):
    """Keeps what the log says, as a structured log writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines(request_id=current_request_id))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def figures(server: RunningServer) -> dict[tuple[str, ...], float]:
    answer = server.client.get("/metrics")
    assert answer.status_code == 200, answer.text
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = sorted(name for name in sample.labels if name != "model_name")
            key = (sample.name.removeprefix(PREFIX), *(sample.labels[name] for name in labels))
            found[key] = sample.value
    return found


def test_metrics_count_what_was_served(tiny: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.context, "metrics", ServeMetrics(tiny.context))
    before = figures(tiny)

    def grown(*key: str) -> float:
        return figures(tiny).get(key, 0) - before.get(key, 0)

    for seed in range(3):
        tiny.ok("/v1/completions", **BODY, seed=seed)
    tiny.events("/v1/completions", **BODY)
    # A stop string ends it in this process; the engine hears of an abort.
    text = tiny.ok("/v1/completions", **BODY)["choices"][0]["text"]
    stopped = tiny.ok("/v1/completions", **BODY, stop=[text[2:4]])
    tiny.refusal("/v1/completions", **{**BODY, "max_tokens": 10**9})
    tiny.wait_idle()
    num_stopped = stopped["usage"]["completion_tokens"]
    assert num_stopped < 6
    assert grown("request_success_total", "length") == 5 and grown("request_success_total", "stop") == 1
    assert grown("generation_tokens_total") == 5 * 6 + num_stopped
    assert grown("prompt_tokens_total") == 6 * 4
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
    ):
        assert grown(f"{name}_count") == 6, name
        assert grown(f"{name}_sum") >= 0, name
    assert grown("inter_token_latency_seconds_count") == 5 * 5 + num_stopped - 1
    assert grown("prefix_cache_queries_total") == 24 and grown("prefix_cache_hits_total") > 0
    assert grown("http_requests_total", "POST", "/v1/completions", "200") == 6
    assert grown("http_requests_total", "POST", "/v1/completions", "400") == 1
    now = figures(tiny)
    assert now[("engine_up",)] == 1 and now[("num_requests_running",)] == 0
    assert now[("kv_cache_usage_perc",)] == 0 and now[("num_requests_admitted",)] == 0


def test_r80_the_log_holds_figures_and_no_text(tiny: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the whole path: whatever a prompt or a name holds, the log has its figures and its id alone."""
    lines = KeptLines()
    logger = logging.getLogger("slipstream")
    logger.addHandler(lines)
    monkeypatch.setattr(logging.getLogger("slipstream.serve.request_log"), "level", logging.INFO)
    settings = ServeSettings(log_requests=True, api_keys=(ApiKey("team", "sk-secret"),))
    try:
        with serving(tiny.service, settings=settings) as server:
            server.client.headers["Authorization"] = "Bearer sk-secret"
            server.client.headers["x-request-id"] = "job-1"
            server.ok("/v1/completions", **{**BODY, "prompt": SECRET})
            server.events("/v1/completions", **{**BODY, "prompt": SECRET}, n=2)
            server.refusal("/v1/completions", **{**BODY, "model": "x\nforged"})
            server.refusal("/v1/completions", **{**BODY, "prompt": SECRET, "temperature": -1})
            checked_error(httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer guess"}))
            server.wait_idle()
    finally:
        logger.removeHandler(lines)
        tiny.context.attach(tiny.service)
    entries = [json.loads(line) for line in lines.lines if "request_log" in line]
    assert [entry["status"] for entry in entries] == [200, 200, 404, 400, 401]
    assert [entry["request_id"] for entry in entries[:4]] == ["job-1"] * 4
    whole, streamed = entries[:2]
    assert whole["output_tokens"] == 6 and whole["finish_reasons"] == ["length"]
    assert streamed["output_tokens"] == 12 and streamed["finish_reasons"] == ["length"] * 2
    assert whole["prompt_tokens"] == streamed["prompt_tokens"] > 5
    for entry in (whole, streamed):
        assert entry["queue_s"] >= 0 and 0 <= entry["ttft_s"] <= entry["duration_s"]
    text = "\n".join(lines.lines)
    assert (
        "launch" not in text
        and "sk-secret" not in text
        and "guess" not in text
        and "\n" not in lines.lines[2]
    )


def test_the_trace_shows_the_requests(tiny: RunningServer) -> None:
    answer = tiny.ok("/v1/completions", **{**BODY, "prompt": list(range(4, 54))})
    tiny.wait_idle()
    found = read_trace(tiny.url)
    assert found.model == "tiny"
    lane = timeline_of(found.trace, model="tiny").lanes[-1]
    assert (lane.num_prompt_tokens, lane.num_output_tokens, lane.outcome) == (50, 6, "length")
    assert answer["usage"]["prompt_tokens"] == 50
    assert [phase.kind for phase in lane.phases] == ["queued", "prefill", "decode"]
    page = tiny.client.get("/trace")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert lane.request_id in page.text and page.text.startswith("<!doctype html>")
    perfetto = tiny.client.get("/trace.perfetto.json").json()
    assert any(
        event["args"].get("name") == lane.request_id for event in perfetto["traceEvents"] if "args" in event
    )


@pytest.mark.parametrize("path", ["/trace", "/trace.json", "/trace.perfetto.json", "/metrics"])
def test_r16_operations_need_a_key(tiny: RunningServer, path: str) -> None:
    settings = ServeSettings(api_keys=(ApiKey("team", "sk-secret"),))
    try:
        with serving(tiny.service, settings=settings) as server:
            assert server.client.get(path).status_code == 401
            if path == "/metrics":
                return
            answer = server.client.get(path, headers={"Authorization": "Bearer sk-secret"})
            assert answer.status_code == 200
    finally:
        tiny.context.attach(tiny.service)


@pytest.mark.parametrize("number", ["1", "-1", "x", "", "9" * 400, "\u0661"])
def test_an_engine_that_is_not_there(tiny: RunningServer, number: str) -> None:
    answer = tiny.client.get("/trace.json", params={"engine": number})
    assert answer.status_code == 400 and checked_error(answer)["param"] == "engine"


def test_one_of_several_engines(tiny: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router answers with a list."""
    tiny.ok("/v1/completions", **BODY)
    command = tiny.service.command

    def asked(name: str, **arguments: Any) -> Any:
        future = command(name, **arguments)
        found = future.result(30)
        several: Any = type(future)()
        several.set_result([found, found])
        return several

    monkeypatch.setattr(tiny.service, "command", asked)
    answer = tiny.client.get("/trace.json", params={"engine": "1"})
    assert answer.status_code == 200
    assert decode_trace(answer.content, source="x").trace.steps


def test_an_engine_that_does_not_answer(tiny: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import Future

    monkeypatch.setattr("slipstream.serve.trace_routes.TIMEOUT_S", 0.05)
    monkeypatch.setattr(tiny.service, "command", lambda name: Future())
    answer = tiny.client.get("/trace")
    assert answer.status_code == 503 and checked_error(answer)["code"] == "engine_stuck"

    def stopped(name: str) -> Any:
        raise EngineError("The engine is shut down.")

    monkeypatch.setattr(tiny.service, "command", stopped)
    answer = tiny.client.get("/trace")
    assert answer.status_code == 503
    checked_error(answer)


def test_service_counts_are_of_this_process(tiny: RunningServer) -> None:
    assert isinstance(tiny.service, EngineService)
    before = tiny.service.counts.num_generation_tokens
    tiny.ok("/v1/completions", **BODY)
    assert tiny.service.counts.num_generation_tokens == before + 6
