"""Is every route of the application closed to whoever has no key, and are only the known ones there?

The routes are those the application has, whoever added them: a new one that is open fails here.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute

from slipstream.serve.app import create_app
from slipstream.serve.auth import ADMIN_PATHS, OPEN_PATHS, PAGE_PATHS
from slipstream.serve.context import ServeContext
from slipstream.serve.log_format import configure_server_log
from slipstream.serve.settings import ApiKey, ServeSettings

KEY, ADMIN_KEY = "key-of-a-user", "key-of-an-operator"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def app_of(**settings: Any) -> Any:
    keys = {"api_keys": (ApiKey("user", KEY),)}
    context = ServeContext(settings=ServeSettings(**{**keys, **settings}), model_names=("m",), admission=None)
    return create_app(context)


def ask(app: Any, method: str, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport) as client:
            return await client.request(method, f"http://server{path}", headers=headers)

    return asyncio.run(asyncio.wait_for(run(), 30))


def paths_of(app: Any) -> Iterator[str]:
    def walk(routes: list[BaseRoute], prefix: str) -> Iterator[str]:
        for route in routes:
            path = prefix + getattr(route, "path", "")
            inner = getattr(route, "routes", None)
            yield from walk(inner, path) if inner else [path]

    yield from walk(app.routes, "")


def concrete(path: str) -> str:
    """Return a path that a route's pattern matches."""
    return "/".join("x" if part.startswith("{") else part for part in path.split("/"))


@pytest.fixture(scope="module")
def full_app() -> Any:
    """Everything that can be switched on."""
    return app_of(admin_keys=(ApiKey("root", ADMIN_KEY),), has_docs=True, has_ui=True)


def test_r16_every_route_needs_a_key_but_the_listed_ones(full_app: Any) -> None:
    paths = sorted({*paths_of(full_app)})
    assert "/v1/chat/completions" in paths and "/health" in paths and len(paths) > 12
    found_open = set()
    for path in paths:
        for method in METHODS:
            status = ask(full_app, method, concrete(path)).status_code
            if status != 401:
                found_open.add(path)
                # A method that an open path does not have is no way in.
                assert status in (200, 405, 503), (method, path, status)
    assert found_open <= OPEN_PATHS | PAGE_PATHS, found_open
    assert found_open >= OPEN_PATHS


@pytest.mark.parametrize(
    "spelling", ["/v1/models/", "//v1/models", "/V1/models", "/v1//models", "/v1/%6dodels"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
def test_r16_no_spelling_of_a_route_is_open(full_app: Any, spelling: str, method: str) -> None:
    assert ask(full_app, method, spelling).status_code == 401
    assert ask(full_app, "GET", "/v1/models", {"Authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_r16_an_open_path_in_another_spelling_is_closed(full_app: Any, path: str) -> None:
    for spelling in (path + "/", "/" + path, path.upper(), f"/%{ord(path[1]):02x}{path[2:]}"):
        assert ask(full_app, "GET", spelling).status_code == 401, spelling


def test_r17_management_routes_are_absent_by_default() -> None:
    app = app_of()
    paths = set(paths_of(app))
    assert not paths & ADMIN_PATHS
    for path in ADMIN_PATHS:
        assert ask(app, "POST", path, {"Authorization": f"Bearer {KEY}"}).status_code == 404
    # What changes a server is on the list, or is not there.
    words = ("load", "lora", "sleep", "wake", "reset", "profile", "update", "weights", "admin", "debug")
    named = [path for path in paths if any(word in path for word in words)]
    answers = {path: ask(app, "POST", concrete(path), {"Authorization": f"Bearer {KEY}"}) for path in named}
    assert {answer.status_code for answer in answers.values()} <= {404, 501}, answers


def test_r17_management_routes_need_the_admin_key(full_app: Any) -> None:
    added = set(paths_of(full_app)) - set(paths_of(app_of(has_docs=True, has_ui=True)))
    assert added == ADMIN_PATHS
    for path in ADMIN_PATHS:
        assert ask(full_app, "POST", path, {"Authorization": f"Bearer {KEY}"}).status_code == 403
        # It passes, and finds that no engine is there yet.
        assert ask(full_app, "POST", path, {"Authorization": f"Bearer {ADMIN_KEY}"}).status_code == 503


def test_r28_a_default_application_has_no_docs_and_no_cors() -> None:
    app = app_of(api_keys=())
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert ask(app, "GET", path).status_code == 404
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = ask(app, "OPTIONS", "/v1/chat/completions", preflight)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    answer = ask(app, "GET", "/v1/models", {"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_only_a_listed_origin_may_ask() -> None:
    app = app_of(cors_origins=("https://chat.example",))
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    listed = ask(app, "OPTIONS", "/v1/chat/completions", {**preflight, "Origin": "https://chat.example"})
    assert listed.status_code == 200
    assert listed.headers["access-control-allow-origin"] == "https://chat.example"
    other = ask(app, "OPTIONS", "/v1/chat/completions", {**preflight, "Origin": "https://evil.example"})
    assert other.headers.get("access-control-allow-origin") is None
    # A preflight carries no key; what follows it must.
    answer = ask(app, "GET", "/v1/models", {"Origin": "https://chat.example"})
    assert answer.status_code == 401 and "https://chat.example" in answer.headers.values()


@pytest.fixture
def server_log() -> Iterator[io.StringIO]:
    """Write the log as a server does; yields what it said. Other tests get their loggers back."""
    names = ("slipstream", "uvicorn", "uvicorn.error", "asyncio", "opentelemetry")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    configure_server_log(as_json=False)
    said = io.StringIO()
    handler = loggers[0].handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(said)
    yield said
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_r27_r80_what_nobody_expected_stays_in_the_log(server_log: io.StringIO) -> None:
    app = app_of(api_keys=())

    async def broken() -> None:
        raise RuntimeError("at 0x7f00aabbccdd in /srv/model.py\nINFO forged line\x1b[31m")

    app.add_api_route("/broken", broken)
    answer = ask(app, "GET", "/broken", {"X-Request-Id": "asked-for-1"})
    assert answer.status_code == 500 and answer.headers["x-request-id"] == "asked-for-1"
    error = answer.json()["error"]
    assert "asked-for-1" in error["message"] and error["code"] == "internal_error"
    assert not [leak for leak in ("0x7f", "/srv", "Runtime", "Traceback", "forged") if leak in answer.text]
    said = server_log.getvalue()
    assert "0x7f00aabbccdd" in said and "asked-for-1" in said, "the log is where the cause is"
    assert "\x1b" not in said and "\nINFO forged" not in said


def test_r80_a_key_is_in_no_log_and_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(log_requests=True)
    with caplog.at_level(logging.DEBUG):
        for key in (KEY, "wrong-key-\x7f"):
            answer = ask(app, "GET", f"/v1/models?api_key={KEY}", {"Authorization": f"Bearer {key}"})
            assert KEY not in answer.text and "wrong-key" not in answer.text
    said = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("slipstream"))
    assert said and KEY not in said and "wrong-key" not in said
