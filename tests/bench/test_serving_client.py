"""Does the client measure what the server did? Held against the server's clock, and every fault."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from slipstream.bench.measure import BenchError
from slipstream.bench.serving_client import ServingClient, Target, root_url
from slipstream.bench.serving_record import RequestRecord, ServingRequest
from slipstream.core.errors import ConfigError
from tests.bench.fake_openai import MODEL, FakeServer, Script, fake_server

T = TypeVar("T")
# A reply that took longer than this to reach the client says something is wrong, however busy the machine.
SLACK_S = 5.0


def in_loop(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 60))


async def send(target: Target, *requests: ServingRequest) -> list[RequestRecord]:
    async with ServingClient(target) as client:
        return [await client.send(request) for request in requests]


def target_of(server: FakeServer, **options: Any) -> Target:
    return Target(**{"url": server.url, "endpoint": "completions", "model": MODEL, **options})


def send_one(script: Script, **options: Any) -> tuple[RequestRecord, FakeServer]:
    with fake_server(script) as server:
        (record,) = in_loop(send(target_of(server, **options), ServingRequest("one two three", 6)))
    return record, server


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_times_are_those_of_the_server(endpoint: str) -> None:
    """Each piece is noted after the server sent it and before it sent the next but few."""
    record, server = send_one(Script(first_s=0.05, gap_s=0.03), endpoint=endpoint)
    (served,) = server.served
    assert record.is_complete and record.finish_reason == "length"
    assert len(record.piece_s) == len(served.pieces_s) == 6
    assert record.sent_s <= served.arrived_s
    for noted, sent in zip(record.piece_s, served.pieces_s, strict=True):
        assert sent <= noted < sent + SLACK_S
    assert served.done_s <= record.end_s < served.done_s + SLACK_S
    assert record.ttft_s is not None and record.ttft_s >= 0.05
    assert record.tpot_s is not None and record.tpot_s >= 0.03 * 0.9
    assert record.e2e_s >= 0.05 + 5 * 0.03 and len(record.gaps_s()) == 5


def test_counts_are_those_of_the_usage() -> None:
    record, server = send_one(Script(base_tokens=7, tokens_per_word=2, tokens_per_piece=3, cached_tokens=4))
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (13, 6, 4)
    assert len(record.piece_s) == 2 and record.disagreement is None
    body = server.served[0].body
    assert (body["max_tokens"], body["stream_options"]) == (6, {"include_usage": True})


def test_what_is_sent() -> None:
    options = {"ignore_eos": True, "temperature": 0.5, "extra_body": {"top_k": 3}, "endpoint": "chat"}
    _, server = send_one(Script(api_key="secret"), api_key="secret", **options)
    body = server.served[0].body
    assert body["messages"] == [{"role": "user", "content": "one two three"}]
    assert (body["ignore_eos"], body["temperature"], body["top_k"]) == (True, 0.5, 3)
    assert "secret" not in repr(target_of(server, api_key="secret"))


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("http_429", "http_429"),
        ("http_500", "http_500"),
        ("cut", "cut_stream"),
        ("error_event", "error_event"),
        ("garbage", "malformed_event"),
        ("hang", "timeout"),
    ],
)
def test_a_fault_is_a_record_under_its_kind(fault: str, kind: str) -> None:
    record, _ = send_one(Script(fault=fault), timeout_s=0.5 if fault == "hang" else 30.0)
    assert (record.error_kind, record.is_complete) == (kind, False)
    assert record.error and record.end_s > record.sent_s
    assert len(record.piece_s) == (0 if fault.startswith("http") else 1)


def test_no_server() -> None:
    with fake_server() as server:
        target = target_of(server)
    (record,) = in_loop(send(target, ServingRequest("x", 1)))
    assert record.error_kind == "connection_refused"


@pytest.mark.parametrize(
    ("script", "what"),
    [
        (Script(has_usage=False), "no usage"),
        (Script(usage_error=-2), "more pieces of text than tokens"),
        (Script(usage_error=3), "more tokens than asked for"),
    ],
)
def test_a_usage_that_contradicts_the_stream_is_reported(script: Script, what: str) -> None:
    record, _ = send_one(script)
    assert record.is_complete and record.disagreement == what


def find_model(script: Script, **options: Any) -> str:
    async def find(server: FakeServer) -> str:
        async with ServingClient(target_of(server, **options)) as client:
            return await client.find_model()

    with fake_server(script) as server:
        return in_loop(find(server))


def test_the_only_model_is_found() -> None:
    assert find_model(Script(models=("only",))) == "only"


@pytest.mark.parametrize(
    ("script", "message"),
    [(Script(models=("a", "b")), "lists 2 models .a, b.; give --model"), (Script(api_key="k"), "--api-key")],
)
def test_no_model_is_guessed(script: Script, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        find_model(script)


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://v1:8000/", "http://v1:8000"),
        ("http://a/v1", "http://a"),
        ("https://a/x/v1/chat/completions", "https://a/x"),
        ("http://a:1/v1/completions/", "http://a:1"),
    ],
)
def test_root_url(given: str, root: str) -> None:
    assert root_url(given) == root


@pytest.mark.parametrize("given", ["localhost:8000", "ftp://a", "http://", "http://u:p@a"])
def test_root_url_of_no_server(given: str) -> None:
    with pytest.raises(ConfigError):
        root_url(given)
