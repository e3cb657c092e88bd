"""How does one request go to a server and come back timed? POST, read the stream, note when text arrives.

Invariant: a request always leaves a record. Whatever goes wrong becomes the record's error, under one word,
and never an exception that would lose the figures of the others.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import msgspec

from slipstream.bench.measure import BenchError
from slipstream.bench.serving_events import DONE, Event, EventSplitter, StreamError, decode_event
from slipstream.bench.serving_record import RequestRecord, ServingRequest
from slipstream.core.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import aiohttp

Endpoint = Literal["completions", "chat"]
ROUTES: dict[str, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
ENCODER = msgspec.json.Encoder()
MAX_ERROR_CHARACTERS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A server, and how requests to it are written. `url` is its root, without `/v1`."""

    url: str
    endpoint: Endpoint
    model: str
    api_key: str | None = dataclasses.field(default=None, repr=False)
    temperature: float = 0.0
    ignore_eos: bool = False
    timeout_s: float = 600.0
    extra_body: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    def body(self, request: ServingRequest) -> bytes:
        """Write the request. A chat's prompt is one user message."""
        fields: dict[str, Any] = {"model": self.model}
        if self.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            fields["prompt"] = request.prompt
        fields |= {
            "max_tokens": request.output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return ENCODER.encode(fields | dict(self.extra_body))


def root_url(url: str) -> str:
    """Return the root of a server from its address, with or without `/v1/...`. Raises ConfigError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url!r} is no address of a server; write e.g. http://127.0.0.1:8000.")
    if parts.username or parts.password:
        raise ConfigError("--url must hold no user or password; give a key by --api-key.")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}" + re.sub(r"/v1(/completions|/chat/completions)?$", "", path)


def import_aiohttp() -> Any:
    """Return aiohttp. Raises MissingExtraError without it."""
    try:
        import aiohttp
    except ImportError:
        raise MissingExtraError(
            "The load generator needs aiohttp, which is not installed; run "
            "`pip install 'slipstream-llm[bench]'`."
        ) from None
    return aiohttp


class ServingClient:
    """Connections to one server. An asynchronous context manager."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._aiohttp = import_aiohttp()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ServingClient:
        # No limit: how many requests run is what the benchmark decides.
        connector = self._aiohttp.TCPConnector(limit=0)
        timeout = self._aiohttp.ClientTimeout(total=self.target.timeout_s)
        self._session = self._aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            headers=self.target.headers,
            # The client would otherwise inflate each piece of text that a server has deflated.
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding",),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def find_model(self) -> str:
        """Return the name of the model the server has. Raises BenchError where that is not one."""
        assert self._session is not None
        url = f"{self.target.url}/v1/models"
        try:
            async with self._session.get(url) as response:
                text = await response.text()
                status = response.status
        except (self._aiohttp.ClientError, OSError) as error:
            raise BenchError(f"No server answers at {self.target.url}: {reason_of(error)}.") from None
        if status != 200:
            advice = "give --api-key" if status in (401, 403) else "give --model"
            raise BenchError(f"{url} answered {status}: {shortened(text)}; {advice}.")
        try:
            names = [str(model["id"]) for model in json.loads(text)["data"]]
        except (ValueError, KeyError, TypeError):
            raise BenchError(f"{url} lists no models: {shortened(text)}; give --model.") from None
        if len(names) != 1:
            raise BenchError(f"{url} lists {len(names)} models ({', '.join(names[:8])}); give --model.")
        return names[0]

    async def send(self, request: ServingRequest, *, due_s: float | None = None) -> RequestRecord:
        """Send one request, read its answer to the end and return the record."""
        body = self.target.body(request)
        now = time.perf_counter()
        record = RequestRecord(now if due_s is None else due_s, request.output_tokens, sent_s=now)
        try:
            await self._stream(body, record)
        except StreamError as error:
            record.fail(error.kind, str(error))
        except TimeoutError:
            record.fail("timeout", f"no end within {self.target.timeout_s:g} s")
        except self._aiohttp.ClientConnectorError as error:
            record.fail("connection_refused", reason_of(error))
        except (self._aiohttp.ClientError, OSError) as error:
            record.fail("connection_lost", reason_of(error))
        if not record.is_complete or not record.end_s:
            record.end_s = time.perf_counter()
        return record

    async def _stream(self, body: bytes, record: RequestRecord) -> None:
        assert self._session is not None
        url = self.target.url + ROUTES[self.target.endpoint]
        async with self._session.post(url, data=body) as response:
            if response.status != 200:
                raise StreamError(f"http_{response.status}", shortened(await response.text()))
            splitter = EventSplitter()
            is_done = False
            # To the end of the body, or the connection could not be used again.
            async for data in response.content.iter_any():
                now = time.perf_counter()
                for payload in splitter.feed(data):
                    if is_done:
                        raise StreamError("malformed_event", "an event came after [DONE]")
                    if payload == DONE:
                        is_done, record.end_s = True, now
                    else:
                        note_event(record, decode_event(payload), now)
            require_end(record, is_done=is_done)


def note_event(record: RequestRecord, event: Event, now: float) -> None:
    for choice in event.choices:
        if choice.has_text:
            record.piece_s.append(now)
        if choice.finish_reason is not None:
            record.finish_reason = choice.finish_reason
    usage = event.usage
    if usage is not None:
        record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens
        record.cached_tokens = usage.cached_tokens


def require_end(record: RequestRecord, *, is_done: bool) -> None:
    if not is_done:
        raise StreamError("cut_stream", "the stream ended before [DONE]")
    if record.finish_reason is None:
        raise StreamError("no_finish_reason", "the stream ended without a finish_reason")


def reason_of(error: BaseException) -> str:
    return shortened(str(error)) or type(error).__name__


def shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_ERROR_CHARACTERS else line[:MAX_ERROR_CHARACTERS] + "..."
