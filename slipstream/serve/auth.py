"""Who may ask for this? Every path needs a key where keys are set, but the few that are named here.

Plain ASGI, before anything is parsed. Invariants: a path is open only if it is spelled exactly as listed, in
the bytes that came over the wire and after decoding; any other spelling of it (a slash more, another case, an
escape) needs a key. A management path, which exists only where admin keys do, needs one of them in whatever
spelling a router could take for it. All
keys are compared in constant time, whether or not one matched before.

Open are `/health` and `/ready`, which probes ask without a key and which tell only the state, and the static
page at `/` with its files, which hold no data. `/version`, `/metrics` and `/server_info` describe the server,
so they need a key.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from slipstream.core.errors import ConfigError
from slipstream.serve.errors import ApiError
from slipstream.serve.settings import ApiKey

OPEN_PATHS = frozenset({"/health", "/ready"})
PAGE_FOLDER = "/page/"
PAGE_FILES = (
    "answer_stream.js",
    "icon.svg",
    "key.js",
    "live.js",
    "markdown.js",
    "options.js",
    "script.js",
    "style.css",
    "turns.js",
)
PAGE_PATHS = frozenset({"/", *(PAGE_FOLDER + name for name in PAGE_FILES)})
ADMIN_PATHS = frozenset({"/sleep", "/wake_up", "/reset_prefix_cache"})
STATE_KEY = "key_name"
# Shown by the answer so that browsers and clients know what to send.
CHALLENGE = {"WWW-Authenticate": "Bearer"}
MAX_KEY_BYTES = 1024


class Keyring:
    """Secrets by name; finds which one a client sent without telling how close it came."""

    def __init__(self, keys: Collection[ApiKey]) -> None:
        # Digests have one length, so a comparison does not depend on a secret's length either.
        self._digests = [(key.name, _digest(key.secret.encode())) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, given: bytes) -> str | None:
        """Return the name of the key that was given, None where it is none of these."""
        digest, found = _digest(given[: MAX_KEY_BYTES + 1]), None
        for name, expected in self._digests:
            if hmac.compare_digest(digest, expected):
                found = name
        return found


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


class Auth:
    """ASGI middleware that lets a request through, or answers 401 or 403.

    Put it inside what answers CORS preflights, and outside everything that reads a body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Collection[ApiKey],
        admin_keys: Collection[ApiKey] = (),
        open_paths: Collection[str] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._api_keys = Keyring(api_keys)
        self._admin_keys = Keyring(admin_keys)
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        refusal = self._refusal(scope)
        if refusal is None:
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            # Closed before it is accepted: the server answers the handshake with 403.
            return await send({"type": "websocket.close", "code": 1008})
        await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Decide on one request, and note whose it is."""
        needs_admin = bool(self._admin_keys) and bool(spellings(scope) & ADMIN_PATHS)
        if not needs_admin and (not self._api_keys or self._is_open(scope)):
            return None
        given = given_key(scope)
        name = None if given is None else self._admin_keys.find(given)
        if name is None and not needs_admin and given is not None:
            name = self._api_keys.find(given)
        if name is not None:
            scope.setdefault("state", {})[STATE_KEY] = name
            return None
        if needs_admin and given is not None and self._api_keys.find(given) is not None:
            return ApiError(
                403, "This route needs an admin key; the key given is an API key.", code="forbidden"
            )
        message = "This route needs a key; send it as `Authorization: Bearer KEY`."
        if given is not None:
            message = "The key given is not one of this server's."
        return ApiError(401, message, code="invalid_api_key", headers=CHALLENGE)

    def _is_open(self, scope: Scope) -> bool:
        raw = raw_path(scope)
        return raw == scope["path"] and raw in self._open_paths


def key_name_of(scope: MutableMapping[str, Any]) -> str:
    """Return the name of the key that a request came with, "" where keys are not used."""
    return scope.get("state", {}).get(STATE_KEY, "")


def given_key(scope: Scope) -> bytes | None:
    """Return the key of `Authorization: Bearer` or `x-api-key`, if exactly one of these was sent."""
    found: list[bytes] = []
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, key = value.partition(b" ")
            found.append(key.strip() if kind.lower() == b"bearer" else b"")
        elif name == b"x-api-key":
            found.append(value.strip())
    return found[0] if len(found) == 1 and found[0] else None


def raw_path(scope: Scope) -> str:
    """Return the path as it came over the wire, without the query."""
    raw = scope.get("raw_path")
    path = scope["path"] if raw is None else raw.decode("latin-1")
    return path.partition("?")[0]


def spellings(scope: Scope) -> set[str]:
    """Return a path in the forms that some router might see in it: raw and decoded, folded."""
    return {_folded(raw_path(scope)), _folded(scope["path"])}


def _folded(path: str) -> str:
    parts = [part for part in path.lower().replace("\\", "/").split("/") if part not in ("", ".")]
    return "/" + "/".join(parts)


def read_key_file(text: str, *, where: str, prefix: str) -> tuple[ApiKey, ...]:
    """Return the keys of a file: one a line, `NAME KEY` or `KEY`; `#` starts a comment.

    A key without a name is called `prefix` and its number. Raises ConfigError.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split() if line.lstrip().startswith("#") else line.split()
        if not words:
            continue
        if len(words) > 2:
            raise ConfigError(f"{where}, line {number}: a line holds `NAME KEY` or `KEY`.")
        name = words[0] if len(words) == 2 else f"{prefix}-{len(keys) + 1}"
        keys.append(ApiKey(name, words[-1]))
    if not keys:
        raise ConfigError(f"{where} holds no key; write one a line, `NAME KEY` or `KEY`.")
    return tuple(keys)
