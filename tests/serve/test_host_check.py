"""Is a local server without keys deaf to the names that a page could rebind, and to nothing else?"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from slipstream.serve.host_check import HostCheck
from slipstream.serve.settings import ApiKey, ServeSettings

KEYS = (ApiKey("a", "key-a"),)


def status(*hosts: str, **settings: Any) -> int:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", host.encode()) for host in hosts]}
    asyncio.run(HostCheck(app, settings=ServeSettings(**settings))(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "127.0.0.1", "localhost", "LOCALHOST:8000", "localhost.", "[::1]:8000", "10.0.0.7"],
)
def test_r28_addresses_and_localhost_are_its_own(host: str) -> None:
    assert status(host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[evil]", ""],
)
def test_r28_a_name_that_a_page_could_rebind_is_refused(host: str) -> None:
    assert status(host) == 403
    assert status("localhost", host) == 403


def test_a_client_without_a_host_is_no_browser() -> None:
    assert status() == 200


@pytest.mark.parametrize(
    "settings",
    [{"api_keys": KEYS}, {"host": "0.0.0.0"}, {"uds": "a.sock"}, {"allowed_hosts": ("evil.example",)}],
)
def test_where_nothing_is_to_be_guarded_any_name_will_do(settings: dict[str, Any]) -> None:
    assert status("evil.example", **settings) == 200
