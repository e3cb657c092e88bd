"""Does the application keep its layers in order? Keys, failures of ours, CORS, whose prefixes are whose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from slipstream.core.errors import RequestError
from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.engine.config import EngineConfig
from slipstream.engine.service import EngineService, local_service
from slipstream.serve.admission import Admission
from slipstream.serve.app import create_app
from slipstream.serve.context import ServeContext
from slipstream.serve.settings import ApiKey, ServeSettings
from tests.engine.tiny import prompt_ids, tiny_llama, write_folder
from tests.serve.tiny_server import ROOM, RunningServer, checked_error, serving

COMPLETIONS = "/v1/completions"
ORIGIN = "https://chat.example.org"
KEYS = {"ann": "secret-of-ann", "bob": "secret-of-bob"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineService]:
    folder: Path = write_folder(tiny_llama(), tmp_path_factory.mktemp("model"))
    service = local_service(EngineConfig(model=folder, device="cpu", dtype="float32", max_seq_len=256))
    yield service
    service.close()


@pytest.fixture(scope="module")
def guarded(service: EngineService) -> Iterator[RunningServer]:
    settings = ServeSettings(
        api_keys=tuple(ApiKey(name, secret) for name, secret in KEYS.items()),
        cors_origins=(ORIGIN,),
        has_docs=True,
    )
    with serving(service, settings=settings) as server:
        yield server


def ask(server: RunningServer, key: str, **body: Any) -> Any:
    headers = {"Authorization": f"Bearer {KEYS[key]}"}
    answer = server.client.post(COMPLETIONS, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_key_opens_and_its_absence_does_not(guarded: RunningServer) -> None:
    assert ask(guarded, "ann", prompt="ba", max_tokens=1)["choices"]
    for path in (COMPLETIONS, "/v1/models", "/v1/responses", "/nothing", "/openapi.json", "/docs"):
        answer = guarded.client.post(path, json={}) if path == COMPLETIONS else guarded.client.get(path)
        assert answer.status_code == 401 and checked_error(answer)["type"] == "authentication_error"
    headers = {"Authorization": f"Bearer {KEYS['ann']}"}
    assert guarded.client.get("/docs", headers=headers).status_code == 200


def cached(answer: Any) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_r46_keys_share_no_cached_prefix(guarded: RunningServer) -> None:
    body = {"prompt": prompt_ids(100, seed=3), "max_tokens": 1}
    assert cached(ask(guarded, "ann", **body)) == 0
    assert cached(ask(guarded, "bob", **body)) == 0
    assert cached(ask(guarded, "ann", **body)) >= 64 and cached(ask(guarded, "bob", **body)) >= 64
    # What one spells as a salt does not lead into the other's cache.
    for salt in ("ann", "ann_", "bob", "x"):
        assert cached(ask(guarded, "bob", cache_salt=salt, **body)) == 0
    assert cached(ask(guarded, "bob", cache_salt="x", **body)) >= 64


def test_a_preflight_needs_no_key_and_names_the_origin(guarded: RunningServer) -> None:
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    answer = guarded.client.options(COMPLETIONS, headers=headers)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == ORIGIN
    other = guarded.client.options(COMPLETIONS, headers={**headers, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_r27_a_failure_of_ours_says_nothing_of_the_inside(
    guarded: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("/srv/secret/path of 0x7f00")

    monkeypatch.setattr(guarded.service, "create_request", fail)
    headers = {"Authorization": f"Bearer {KEYS['ann']}", "X-Request-Id": "request-77"}
    answer = guarded.client.post(COMPLETIONS, json={"prompt": "ba"}, headers=headers)
    error = checked_error(answer)
    assert answer.status_code == 500 and error["code"] == "internal_error" and "secret" not in answer.text
    assert "request-77" in error["message"] and answer.headers["x-request-id"] == "request-77"
    assert any("request-77" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("code", "status"), [("numerical_error", 500), ("engine_stopped", 503)])
def test_r27_r40_what_the_engine_says_of_its_inside_stays_inside(
    guarded: RunningServer, monkeypatch: pytest.MonkeyPatch, code: str, status: int
) -> None:
    """A request that the engine fails is an error with its id; the engine's words are for the log."""

    def submit(request: Any, listener: Any, *, streams: Any = False) -> None:
        error = RequestError("The engine stopped: OSError: /srv/secret/path", code=code)
        sample = CompletionOutput(0, finish_reason="error")
        listener(RequestOutput(request.request_id, None, [5], [sample], finished=True, error=error))
        guarded.context.hub.flush()

    monkeypatch.setattr(guarded.service, "submit", submit)
    headers = {"Authorization": f"Bearer {KEYS['ann']}", "X-Request-Id": "request-78"}
    for streams in (False, True):
        body = {"prompt": "ba", "stream": streams}
        answer = guarded.client.post(COMPLETIONS, json=body, headers=headers)
        error = checked_error(answer)
        assert answer.status_code == status and error["code"] == code
        assert "secret" not in answer.text and "request-78" in error["message"]


def test_before_there_is_an_engine_new_work_waits() -> None:
    context = ServeContext(settings=ServeSettings(), model_names=("tiny",), admission=Admission(ROOM))
    with TestClient(create_app(context)) as client:
        answer = client.post(COMPLETIONS, json={"prompt": "ba"})
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert answer.json()["error"]["code"] == "loading"
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] is None
        assert client.get("/server_info").status_code == 503
