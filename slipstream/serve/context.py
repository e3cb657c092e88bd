"""What does a route get to work with? One `ServeContext` for the life of an application.

The server listens before its engine is ready and after it stopped taking requests, so `service` raises
meanwhile: a route that needs the engine answers 503 without a branch of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from slipstream.core.checks import shown
from slipstream.engine.service import EngineService
from slipstream.serve.admission import Admission
from slipstream.serve.errors import RETRY_AFTER, ApiError, JsonResponse
from slipstream.serve.prompt_work import PromptWork
from slipstream.serve.settings import ServeSettings
from slipstream.serve.streams import StreamHub

T = TypeVar("T")

# Tokenizing and rendering release the lock for most of their time; more threads than cores bring nothing.
NUM_WORKERS = 4
LOADING = "The model is still loading; try again in a few seconds."


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class ServeContext:
    """The engine's service, the server's options, and what all routes share.

    `admission.admit(key, num_requests=, num_tokens=)` returns a ticket or raises; `metrics` and `spans` may
    be None.
    `refusal` is why no new work is taken at the moment (loading, draining), None where it is. `workers` does
    what would block the event loop.
    """

    settings: ServeSettings
    model_names: Sequence[str]
    admission: Admission | None
    metrics: Any = None
    spans: Any = None
    refusal: ApiError | None = dataclasses.field(
        default_factory=lambda: ApiError(503, LOADING, code="loading", headers=RETRY_AFTER)
    )
    hub: StreamHub = dataclasses.field(default_factory=StreamHub)
    workers: ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="slipstream-serve")
    )
    _service: EngineService | None = None
    _prompts: PromptWork | None = None

    @property
    def service(self) -> EngineService:
        """The engine. Raises ApiError (503) before there is one."""
        if self._service is None:
            raise self.refusal or ApiError(503, LOADING, code="loading", headers=RETRY_AFTER)
        return self._service

    def close(self) -> None:
        """End the worker threads and send the spans that are left; the engine is its owner's. Idempotent."""
        self.workers.shutdown(wait=False, cancel_futures=True)
        if self.spans is not None:
            self.spans.close()

    @property
    def prompts(self) -> PromptWork:
        assert self._prompts is not None, "the service is asked for first"
        return self._prompts

    @property
    def has_service(self) -> bool:
        return self._service is not None

    def attach(self, service: EngineService) -> None:
        """Let the routes use an engine that is ready, and take new work from now on."""
        service.after_batch = self.hub.flush
        self._prompts = PromptWork(service)
        self._service = service
        self.refusal = None

    def check_open(self) -> EngineService:
        """Return the engine for new work. Raises ApiError while none is taken."""
        if self.refusal is not None:
            raise self.refusal
        return self.service

    async def off_loop(self, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Do work on a worker thread, so that the event loop goes on."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.workers, functools.partial(work, *arguments, **options))

    async def json_off_loop(self, work: Callable[..., Any], *arguments: Any) -> JsonResponse:
        """Answer with what `work` returns; a worker thread does it, and encodes it."""
        return JsonResponse(await self.off_loop(lambda: msgspec.json.encode(work(*arguments))))

    def check_model(self, name: str | None, param: str = "model") -> str:
        """Return the name of the model to use; unset is the first one served. Raises ApiError (404)."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            served = ", ".join(self.model_names)
            message = f"There is no model {shown(name)} here; served: {served}."
            raise ApiError(404, message, param=param, code="model_not_found")
        return name
