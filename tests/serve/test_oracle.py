"""Does the oracle see what it is for? Each of its clauses is broken once on purpose."""

from __future__ import annotations

import os
import threading
from typing import Any

import httpx
import pytest

from tests.serve.oracle import MAX_POOL_THREADS, Oracle, Target
from tests.serve.tiny_server import MODEL, RunningServer


def target_of(server: RunningServer) -> Target:
    def free_pages() -> tuple[int, int]:
        stats = server.service.stats().result(60)
        return stats["num_free_pages"], stats["num_pages"]

    return Target(url=server.url, model=MODEL, free_pages=free_pages)


@pytest.fixture
def oracle(tiny: RunningServer) -> Oracle:
    from slipstream.serve.metrics import ServeMetrics

    if tiny.context.metrics is None:
        tiny.context.metrics = ServeMetrics(tiny.context)
    return Oracle(target_of(tiny))


def test_a_fault_that_is_handled_passes(oracle: Oracle) -> None:
    with oracle.watching(), oracle.client() as client:
        error = oracle.check(client.post("/v1/completions", json=oracle.body("x", top_p=7)), status=400)
        assert error["param"] == "top_p"
        oracle.check(client.post("/v1/completions", content=b"{"), status=415)
        oracle.check(client.get("/nowhere"), status=404)


def test_a_victim_whose_text_changes_is_seen(oracle: Oracle) -> None:
    oracle.baseline[2] += "x"
    with pytest.raises(AssertionError, match="victim 2"), oracle.watching():
        pass


def test_threads_that_stay_are_seen(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.serve.oracle.SETTLE_S", 0.2)
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait, daemon=True) for _ in range(MAX_POOL_THREADS + 1)]
    with pytest.raises(AssertionError, match="num_threads"), oracle.watching():
        list(map(threading.Thread.start, threads))
    stop.set()


def test_an_open_file_is_seen(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.serve.oracle.SETTLE_S", 0.2)
    held: list[int] = []
    with pytest.raises(AssertionError, match="num_files"), oracle.watching():
        held.append(os.open(os.devnull, os.O_RDONLY))
    os.close(held.pop())


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (200, {"error": {"message": "m", "type": "t", "param": None, "code": None}}, {}),
        (400, {"detail": "m"}, {}),
        (400, {"error": {"message": "m"}}, {}),
        (500, {"error": {"message": "in /work/x", "type": "t", "param": None, "code": None}}, {}),
        (500, {"error": {"message": "Traceback", "type": "t", "param": None, "code": None}}, {}),
        (500, {"error": {"message": "at 0x7f3a2c001d60", "type": "t", "param": None, "code": None}}, {}),
        (400, {"error": {"message": "the prompt of another", "type": "t", "param": None, "code": None}}, {}),
        (400, {"error": {"message": "m", "type": "t", "param": None, "code": None}}, {"x-file": "/tmp/a"}),
    ],
)
def test_an_answer_that_says_too_much_or_too_little_is_seen(
    oracle: Oracle, status: int, body: Any, headers: dict[str, str]
) -> None:
    with pytest.raises(AssertionError):
        oracle.check(httpx.Response(status, json=body, headers=headers), foreign=["prompt of another"])
