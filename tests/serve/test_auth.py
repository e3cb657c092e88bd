"""Does every spelling of every path need a key, but the few that are open exactly as written?"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from slipstream.core.errors import ConfigError
from slipstream.serve.auth import ADMIN_PATHS, OPEN_PATHS, Auth, Keyring, key_name_of, read_key_file
from slipstream.serve.settings import ApiKey

KEYS = (ApiKey("alice", "key-of-alice"), ApiKey("bob", "key-of-bob"))
ADMINS = (ApiKey("root", "key-of-root"),)
CLOSED = ["/v1/models", "/v1/chat/completions", "/metrics", "/server_info", "/version", "/nowhere", "/docs"]


def ask(
    path: str,
    *headers: tuple[str, str],
    method: str = "GET",
    raw: bytes | None = None,
    kind: str = "http",
    keys: tuple[ApiKey, ...] = KEYS,
    admins: tuple[ApiKey, ...] = ADMINS,
) -> tuple[int, dict[str, Any], str | None]:
    """Return (status, body, name of the key as the application saw it or None if it was not reached)."""
    sent: list[Any] = []
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(key_name_of(scope))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "raw_path": path.encode() if raw is None else raw,
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
    }
    asyncio.run(Auth(app, api_keys=keys, admin_keys=admins)(scope, receive, send))
    if sent[0]["type"] == "websocket.close":
        return 403, {}, None
    body = json.loads(sent[1]["body"])
    return sent[0]["status"], body, seen[0] if seen else None


def bearer(key: str) -> tuple[str, str]:
    return "Authorization", f"Bearer {key}"


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE", "BREW"])
def test_r16_no_path_is_served_without_a_key(path: str, method: str) -> None:
    status, body, seen = ask(path, method=method)
    assert (status, seen) == (401, None)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_r16_the_open_paths_are_open_as_written_and_in_no_other_spelling(path: str) -> None:
    assert ask(path)[0] == 200
    assert ask(path, method="HEAD")[0] == 200
    others = [
        path + "/",
        "/" + path,
        path.upper(),
        path + "/../v1/models",
        path + "//",
        path + "%00",
        path + ";x",
    ]
    for other in others:
        assert ask(other)[0] == 401, other
    # What decodes to an open path was not written as one.
    assert ask(path, raw=f"/%{ord(path[1]):02x}{path[2:]}".encode())[0] == 401
    # An escape that decodes to another path than the raw one.
    assert ask("/v1/models", raw=path.encode())[0] == 401


def test_r16_a_query_does_not_close_an_open_path() -> None:
    assert ask("/health", raw=b"/health?verbose=1")[0] == 200


@pytest.mark.parametrize("kind", ["websocket"])
def test_r16_websockets_need_a_key_too(kind: str) -> None:
    assert ask("/v1/realtime", kind=kind)[2] is None
    assert ask("/v1/realtime", bearer("key-of-bob"), kind=kind)[2] == "bob"


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", "key-of-alice")],
        [("Authorization", "Basic key-of-alice")],
        [("Authorization", "Bearer ")],
        [bearer("key-of-alicE")],
        [bearer("key-of-alice2")],
        [bearer("key-of-alic")],
        [bearer("key-of-alice"), bearer("key-of-alice")],
        [bearer("wrong"), ("X-Api-Key", "key-of-alice")],
        [bearer("k" * 100_000)],
    ],
)
def test_r16_a_wrong_key_is_refused(headers: list[tuple[str, str]]) -> None:
    status, body, seen = ask("/v1/models", *headers)
    assert (status, seen) == (401, None)
    assert "alice" not in json.dumps(body)


def test_every_key_opens_and_is_known_by_its_name() -> None:
    assert ask("/v1/models", bearer("key-of-alice"))[2] == "alice"
    assert ask("/v1/models", ("authorization", "bearer  key-of-bob"))[2] == "bob"
    assert ask("/v1/models", ("x-api-key", "key-of-bob"))[2] == "bob"


def test_without_keys_everything_is_open_but_management() -> None:
    assert ask("/v1/models", keys=()) == (200, {}, "")
    assert ask("/sleep", keys=(), method="POST")[0] == 401


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
def test_r17_management_needs_an_admin_key_in_every_spelling(path: str) -> None:
    assert ask(path, bearer("key-of-root"))[2] == "root"
    escaped = f"/%{ord(path[1]):02X}{path[2:]}".encode()
    for spelling in (path, path + "/", "/" + path, path.upper(), "/." + path):
        assert ask(spelling, bearer("key-of-alice"))[0] == 403, spelling
        assert ask(spelling)[0] == 401, spelling
    assert ask(path, bearer("key-of-alice"), raw=escaped)[0] == 403


def test_r17_without_admin_keys_a_management_path_is_like_any_other() -> None:
    assert ask("/sleep", admins=())[0] == 401
    assert ask("/sleep", bearer("key-of-bob"), admins=())[2] == "bob"


def test_r16_every_key_is_compared_whether_or_not_one_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    ring = Keyring(KEYS)
    assert ring.find(b"key-of-alice") == "alice"
    assert len(compared) == 2
    assert ring.find(b"x") is None
    assert len(compared) == 4 and len({len(part) for pair in compared for part in pair}) == 1


def test_a_key_file_names_its_keys() -> None:
    text = "# who may\nalice  secret#1\n\nsecret-2\n"
    keys = read_key_file(text, where="keys.txt", prefix="key")
    assert [(key.name, key.secret) for key in keys] == [("alice", "secret#1"), ("key-2", "secret-2")]


@pytest.mark.parametrize("text", ["", "# nothing\n", "a b c\n", "bad/name secret\n", "alice s\x00cret\n"])
def test_a_key_file_that_makes_no_sense_is_refused_without_showing_a_key(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_key_file(text, where="keys.txt", prefix="key")
    assert "cret" not in str(refused.value)
