"""Which server do the tests of the load generator measure? One that follows a script and keeps its times.

It speaks enough of OpenAI's API (models, streamed completions and chats) and runs in a thread of this
process, so its clock is the client's: what it wrote down is the truth that measured figures are held against.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from aiohttp import web

MODEL = "fake"
WAIT_S = 20.0


@dataclasses.dataclass(kw_only=True)
class Script:
    """How the server answers. `fault` is what goes wrong, on each request or on those of `fault_on`."""

    first_s: float = 0.0
    gap_s: float = 0.0
    tokens_per_piece: int = 1
    base_tokens: int = 0
    tokens_per_word: int = 1
    # Answers end after so many tokens, whatever was asked for.
    longest: int = 1 << 30
    usage_error: int = 0
    has_usage: bool = True
    cached_tokens: int = 0
    fault: str = ""
    fault_on: frozenset[int] | None = None
    models: tuple[str, ...] = (MODEL,)
    api_key: str | None = None


@dataclasses.dataclass
class Served:
    """One request as the server saw it, in the client's clock."""

    body: dict[str, Any]
    arrived_s: float
    pieces_s: list[float] = dataclasses.field(default_factory=list)
    done_s: float = 0.0


class FakeServer:
    """The server behind `url`."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.served: list[Served] = []
        self.url = ""
        self.most_at_once = 0
        self._running = 0

    async def models(self, request: web.Request) -> web.Response:
        if not self._is_allowed(request):
            return web.json_response({"error": {"message": "no key"}}, status=401)
        return web.json_response({"data": [{"id": name} for name in self.script.models]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        script, now = self.script, time.perf_counter()
        served = Served(await request.json(), now)
        number = len(self.served)
        self.served.append(served)
        if not self._is_allowed(request):
            return web.json_response({"error": {"message": "no key"}}, status=401)
        fault = script.fault if script.fault_on is None or number in script.fault_on else ""
        if fault.startswith("http_"):
            return web.json_response({"error": {"message": "busy"}}, status=int(fault[5:]))
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        try:
            return await self._stream(request, served, fault)
        finally:
            self._running -= 1

    def _is_allowed(self, request: web.Request) -> bool:
        key = self.script.api_key
        return key is None or request.headers.get("Authorization") == f"Bearer {key}"

    async def _stream(self, request: web.Request, served: Served, fault: str) -> web.StreamResponse:
        script, body = self.script, served.body
        is_chat = "messages" in body
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event: Any) -> None:
            data = event if isinstance(event, str) else json.dumps(event)
            await response.write(f"data: {data}\n\n".encode())

        if is_chat:
            await send(chunk(is_chat, "", role="assistant"))
        tokens = min(body["max_tokens"], script.longest)
        for count in range(0, tokens, script.tokens_per_piece):
            await asyncio.sleep(script.gap_s if count else script.first_s)
            if count and fault == "error_event":
                await send({"error": {"message": "engine stopped", "type": "server_error"}})
                return response
            if count and fault == "garbage":
                await send("{not json")
                return response
            if count and fault in ("cut", "hang"):
                await asyncio.sleep(WAIT_S if fault == "hang" else 0)
                return response
            served.pieces_s.append(time.perf_counter())
            await send(chunk(is_chat, "word "))
        await send(chunk(is_chat, "", finish="length" if tokens == body["max_tokens"] else "stop"))
        if script.has_usage:
            await send({"choices": [], "usage": self._usage(body, tokens)})
        served.done_s = time.perf_counter()
        await send("[DONE]")
        return response

    def _usage(self, body: dict[str, Any], tokens: int) -> dict[str, Any]:
        prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        script = self.script
        words = len(prompt.split()) if isinstance(prompt, str) else 0
        count = script.base_tokens + script.tokens_per_word * words if words else len(prompt)
        return {
            "prompt_tokens": count,
            "completion_tokens": tokens + script.usage_error,
            "prompt_tokens_details": {"cached_tokens": script.cached_tokens},
        }


def chunk(is_chat: bool, text: str, *, role: str | None = None, finish: str | None = None) -> dict[str, Any]:
    if not is_chat:
        return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    delta = {"role": role, "content": text} if role else {"content": text} if text else {}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


@contextlib.contextmanager
def fake_server(script: Script | None = None) -> Iterator[FakeServer]:
    """Run a server until the block ends."""
    server = FakeServer(script or Script())
    loop = asyncio.new_event_loop()
    is_up = threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/v1/models", server.models)
        app.router.add_post("/v1/completions", server.answer)
        app.router.add_post("/v1/chat/completions", server.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def run() -> None:
        runner = loop.run_until_complete(start())
        is_up.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, name="fake-openai", daemon=True)
    thread.start()
    assert is_up.wait(WAIT_S)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
