"""Does `/metrics` say what happened, under bounded labels, and the same whichever worker is asked?"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from slipstream.core.foreign_metrics import METRICS
from slipstream.core.outputs import RequestMetrics
from slipstream.engine.health import Health
from slipstream.engine.request_counts import RequestCounts
from slipstream.serve import worker_counts
from slipstream.serve.metrics import PREFIX, ServeMetrics, add_routes
from slipstream.serve.worker_counts import CountsFolder, WorkerCounts

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ("served", "also-served")
STATS = {
    "num_running": 3,
    "num_waiting": 2,
    "kv_cache_usage": 0.25,
    "num_preemptions": 4,
    "num_queried_tokens": 100,
    "num_cached_tokens": 40,
    "executed_tokens": 60,
    "num_plans": 9,
}


@dataclasses.dataclass
class FakeContext:
    """As much of a ServeContext as metrics look at; no engine at first."""

    admission: Any = None
    model_names: tuple[str, ...] = NAMES
    metrics: Any = None
    service: Any = None

    @property
    def has_service(self) -> bool:
        return self.service is not None


def fake_service(counts: RequestCounts | None = None, *, state: str = "ready", **stats: float) -> Any:
    info = SimpleNamespace(device="cpu", dtype="float32", quantization="none", model="/secret/place/model")
    return SimpleNamespace(
        counts=counts or RequestCounts(),
        info=info,
        health=lambda: Health(state),  # type: ignore[arg-type]
        client=SimpleNamespace(last_stats=lambda: STATS | stats),
    )


def samples(metrics: ServeMetrics) -> dict[tuple[str, ...], float]:
    """Return every sample by (name without prefix, label values in the order of their names)."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            assert sample.name.startswith(PREFIX)
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            assert sample.labels.get("model_name", NAMES[0]) == NAMES[0]
            key = (sample.name.removeprefix(PREFIX), *(labels[name] for name in sorted(labels)))
            assert key not in found
            found[key] = sample.value
    return found


def add_request(counts: RequestCounts, *, ttft_s: float) -> None:
    metrics = RequestMetrics(10.0, 10.0 + ttft_s, 13.0, 10.25, 12.5)
    counts.ttft.add(metrics.ttft_s)
    counts.itl.add(0.02)
    counts.num_prompt_tokens += 7
    counts.num_generation_tokens += 5
    counts.finished["stop"] = counts.finished.get("stop", 0) + 1
    counts.add_finished(metrics)


def test_every_family_says_what_happened() -> None:
    counts = RequestCounts()
    add_request(counts, ttft_s=0.5)
    bounds = SimpleNamespace(max_requests=10, max_tokens=1000)
    admission = SimpleNamespace(num_refused=6, num_requests=5, num_tokens=50, bounds=bounds)
    metrics = ServeMetrics(FakeContext(admission, service=fake_service(counts)))  # type: ignore[arg-type]
    found = samples(metrics)
    assert found[("num_requests_running",)] == 3 and found[("num_requests_waiting",)] == 2
    assert found[("kv_cache_usage_perc",)] == 0.25 and found[("num_preemptions_total",)] == 4
    assert (found[("prefix_cache_queries_total",)], found[("prefix_cache_hits_total",)]) == (100, 40)
    assert (found[("prompt_tokens_total",)], found[("generation_tokens_total",)]) == (7, 5)
    assert found[("request_success_total", "stop")] == 1 and found[("request_success_total", "error")] == 0
    assert found[("engine_up",)] == 1 and found[("engine_asleep",)] == 0
    assert found[("requests_refused_total",)] == 6
    assert (found[("num_requests_admitted",)], found[("max_requests_admitted",)]) == (5, 10)
    assert (found[("num_tokens_admitted",)], found[("max_tokens_admitted",)]) == (50, 1000)
    assert found[("executed_tokens_total",)] == 60 and found[("engine_steps_total",)] == 9
    for name, seconds in {
        "time_to_first_token_seconds": 0.5,
        "inter_token_latency_seconds": 0.02,
        "e2e_request_latency_seconds": 3.0,
        "request_queue_time_seconds": 0.25,
        "request_prefill_time_seconds": 0.25,
        "request_decode_time_seconds": 2.0,
    }.items():
        assert found[(f"{name}_sum",)] == pytest.approx(seconds), name
        assert found[(f"{name}_count",)] == found[(f"{name}_bucket", "+Inf")] == 1
        below = [float(key[1]) for key in found if key[0] == f"{name}_bucket" and found[key] == 0]
        above = [float(key[1]) for key in found if key[0] == f"{name}_bucket" and found[key] == 1]
        assert max(below) < seconds <= min(above), name


def test_the_model_file_is_not_told() -> None:
    text = ServeMetrics(FakeContext(service=fake_service())).render()[0].decode()  # type: ignore[arg-type]
    assert "/secret" not in text and 'build_info{device="cpu"' in text


def test_before_an_engine_and_after_it() -> None:
    context = FakeContext()
    metrics = ServeMetrics(context)  # type: ignore[arg-type]
    assert samples(metrics)[("engine_up",)] == 0
    context.service = fake_service(state="stuck")
    found = samples(metrics)
    # Counters go on; gauges of an engine that does not answer would lie.
    assert (found[("engine_up",)], found[("num_requests_running",)]) == (0, 0)
    assert found[("num_preemptions_total",)] == 4
    context.service = fake_service(state="asleep")
    assert (samples(metrics)[("engine_up",)], samples(metrics)[("engine_asleep",)]) == (1, 1)


def test_hostile_names_make_no_series() -> None:
    """A thousand model names, paths and methods of a client's choice are counted, in few series."""
    app = FastAPI()
    context = FakeContext(service=fake_service())
    metrics = context.metrics = ServeMetrics(context)  # type: ignore[arg-type]
    add_routes(app, context)  # type: ignore[arg-type]

    @app.get("/v1/models/{model}")
    def model(model: str) -> str:
        return model

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        async def watch(message: Any) -> None:
            if message["type"] == "http.response.start":
                metrics.count_http(scope, message["status"])
            await send(message)

        await app(scope, receive, watch if scope["type"] == "http" else send)

    client = TestClient(counting)
    rng = random.Random(5)
    for number in range(250):
        name = f"{number}-{rng.randbytes(8).hex()}"
        client.get(f"/v1/models/{name}", headers={"Accept": name})
        client.get(f"/{name}")
        client.request(name.encode().hex().upper()[:12], "/metrics")
        client.request("BREW", f"/v1/models/{name}")
    found = {key: value for key, value in samples(metrics).items() if key[0] == "http_requests_total"}
    assert found == {
        ("http_requests_total", "GET", "/v1/models/{model}", "200"): 250,
        ("http_requests_total", "GET", "unmatched", "404"): 250,
        ("http_requests_total", "other", "/metrics", "405"): 250,
        ("http_requests_total", "other", "/v1/models/{model}", "405"): 250,
    }
    # Six histograms of 24 to 28 series, and some thirty others.
    assert len(samples(metrics)) < 220
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain") and PREFIX in answer.text
    wants = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = client.get("/metrics", headers=wants)
    assert "openmetrics" in answer.headers["content-type"] and answer.text.endswith("# EOF\n")


def work(folder: str, number: int, is_ready: Any, may_end: Any) -> None:
    """One API worker: it serves `number` requests, publishes and waits."""
    counts = RequestCounts()
    for _ in range(number):
        add_request(counts, ttft_s=0.5)
    bounds = SimpleNamespace(max_requests=10, max_tokens=1000)
    admission = SimpleNamespace(num_refused=1, num_requests=number, num_tokens=0, bounds=bounds)
    metrics = ServeMetrics(
        FakeContext(admission, service=fake_service(counts)),  # type: ignore[arg-type]
        folder=Path(folder),
    )
    route = SimpleNamespace(path="/v1/completions")
    for _ in range(number):
        metrics.count_http({"route": route, "method": "POST"}, 200)
    is_ready.set()
    may_end.wait(60)
    metrics.close()


def test_workers_add_up_whichever_is_asked(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    may_end = spawn.Event()
    others = []
    for number in (2, 3):
        is_ready = spawn.Event()
        other = spawn.Process(target=work, args=(str(tmp_path), number, is_ready, may_end))
        other.start()
        others.append((other, is_ready))
    counts = RequestCounts()
    add_request(counts, ttft_s=0.5)
    metrics = ServeMetrics(FakeContext(service=fake_service(counts)), folder=tmp_path)  # type: ignore[arg-type]
    try:
        for _, is_ready in others:
            assert is_ready.wait(60)
        deadline = time.monotonic() + 30
        while samples(metrics).get(("http_requests_total", "POST", "/v1/completions", "200")) != 5:
            assert time.monotonic() < deadline, "the workers' counts never arrived"
            time.sleep(0.05)
        found = samples(metrics)
        assert found[("prompt_tokens_total",)] == 7 * 6
        assert found[("time_to_first_token_seconds_count",)] == 6
        assert found[("num_requests_admitted",)] == 5 and found[("max_requests_admitted",)] == 20
        # The engine is one, however many workers ask it.
        assert found[("num_requests_running",)] == 3
    finally:
        may_end.set()
        for other, _ in others:
            other.join(30)
        metrics.close()
    assert not list(tmp_path.glob("*.tmp"))
    assert samples(metrics)[("prompt_tokens_total",)] == 7 * 6, "what ended workers counted still counts"


def test_gauges_of_a_worker_that_is_gone_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = WorkerCounts(num_held_requests=4, num_refused=2)
    CountsFolder(tmp_path).publish(gone)
    here = CountsFolder(tmp_path)
    assert here.total(WorkerCounts()).num_held_requests == 4
    monkeypatch.setattr(worker_counts, "LIVE_S", -1.0)
    total = here.total(WorkerCounts())
    assert (total.num_held_requests, total.num_refused) == (0, 2)


def test_r78_a_folder_that_cannot_be_written_does_not_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    metrics = ServeMetrics(FakeContext(service=fake_service()), folder=folder)  # type: ignore[arg-type]
    metrics.close()
    assert samples(metrics)[("engine_up",)] == 1
    assert [record.message for record in caplog.records] == [
        "counts cannot be written for the other workers: No such file or directory"
    ]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"http": 3}', b"\xff" * 100])
def test_a_file_that_is_no_counts_counts_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "worker-x.json").write_bytes(content)
    assert CountsFolder(tmp_path).total(WorkerCounts(num_refused=3)).num_refused == 3


def test_names_from_other_engines_lead_to_ours() -> None:
    metrics = ServeMetrics(FakeContext(service=fake_service()))  # type: ignore[arg-type]
    ours = {key[0] for key in samples(metrics)}
    families = {family.name for family in metrics.families()}
    rows = [row for row in METRICS if row.ours]
    assert len(rows) > 20
    for row in rows:
        name = row.ours.removeprefix(PREFIX)
        assert row.ours.startswith(PREFIX) and (name in ours or row.ours in families), row.name


def test_the_documentation_has_every_metric_as_it_is() -> None:
    metrics = ServeMetrics(FakeContext(service=fake_service()))  # type: ignore[arg-type]
    metrics.count_http({"method": "GET"}, 404)
    expected = []
    for family in metrics.families():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        shown = ", ".join(f"`{label}`" for label in labels)
        expected.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith(f"| `{PREFIX}")] == expected


def test_two_applications_do_not_meet() -> None:
    one, other = (ServeMetrics(FakeContext(service=fake_service())) for _ in range(2))  # type: ignore[arg-type]
    one.count_http({"method": "GET"}, 404)
    key = ("http_requests_total", "GET", "unmatched", "404")
    assert samples(one)[key] == 1 and key not in samples(other)


def test_counts_are_written_as_json(tmp_path: Path) -> None:
    CountsFolder(tmp_path).publish(WorkerCounts(http={"/x GET 200": 2}))
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["http"] == {"/x GET 200": 2}
