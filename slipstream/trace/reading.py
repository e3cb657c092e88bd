"""Where does a trace come from? A running server, or a file that was kept.

Invariant: what is read is checked before anything is made of it, and its size is bounded.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from slipstream import __version__
from slipstream.core.errors import ConfigError
from slipstream.engine.step_records import EngineTrace

FORMAT = "slipstream-trace"
VERSION = 1
MAX_BYTES = 256 << 20
TIMEOUT_S = 30.0
ROUTE = "/trace.json"


class TraceFile(msgspec.Struct):
    """A trace as it is kept and served."""

    model: str
    trace: EngineTrace
    format: str = FORMAT
    version: int = VERSION
    made_by: str = f"slipstream {__version__}"


def encode_trace(trace: EngineTrace, *, model: str) -> bytes:
    return msgspec.json.encode(TraceFile(model, trace))


def decode_trace(data: bytes, *, source: str) -> TraceFile:
    """Check what was read. Raises ConfigError where it is no trace, or of another version."""
    try:
        found = msgspec.json.decode(data, type=TraceFile)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"{source} holds no trace of slipstream ({error}); give the address of a running server, or a "
            f"file that was saved from its {ROUTE}."
        ) from None
    if found.format != FORMAT or found.version != VERSION:
        raise ConfigError(
            f"{source} holds a trace of {found.format[:64]!r} version {found.version}, and this is version "
            f"{VERSION}; use the slipstream that made it ({found.made_by[:64]!r})."
        )
    return found


def read_trace(source: str, *, api_key: str | None = None) -> TraceFile:
    """Read a trace from a server's address (http or https) or a file. Raises ConfigError."""
    if urlsplit(source).scheme in ("http", "https"):
        return decode_trace(_fetch(source, api_key), source=source)
    try:
        with Path(source).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{source} cannot be read ({error.strerror}); give the address of a running server, as in "
            "http://127.0.0.1:8000, or a trace file."
        ) from None
    return decode_trace(_bounded(data, source), source=source)


def _bounded(data: bytes, source: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{source} is larger than a trace can be ({MAX_BYTES} bytes).")
    return data


def _fetch(url: str, api_key: str | None) -> bytes:
    address = url if urlsplit(url).path.endswith(ROUTE) else url.rstrip("/") + ROUTE
    request = urllib.request.Request(address)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        # A key is not carried to wherever a server may point.
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S) as answer:
            return _bounded(answer.read(MAX_BYTES + 1), address)
    except urllib.error.HTTPError as error:
        advice = {401: "; give --api-key", 404: "; is it a slipstream server?"}.get(error.code, "")
        raise ConfigError(f"{address} answered {error.code} {error.reason}{advice}.") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"{address} cannot be reached ({reason}); is the server running?") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None
