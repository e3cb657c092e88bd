"""What does a door need of an engine, wherever it runs? Facts, prompts to requests, requests to outputs.

`local_service` runs the engine in this process. Every method may be called from any thread; listeners and
`after_batch` run on the one thread that reads the engine's events.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from slipstream.core.collector import FROZEN
from slipstream.core.errors import EngineError, RequestError
from slipstream.core.request import Request, RequestOptions
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.client import EngineClient, InProcessClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine_info import EngineInfo, info_of
from slipstream.engine.health import DEFAULT_MAX_STEP_S, Health
from slipstream.engine.output_processor import Listener, OutputProcessor, Streams
from slipstream.engine.prompts import Encoded, PromptEncoder
from slipstream.engine.pump import Pump
from slipstream.engine.request_counts import RequestCounts
from slipstream.text.base import Tokenizer

if TYPE_CHECKING:
    # A door whose engine is in another process never loads torch.
    from slipstream.engine.assembly import Assembly, Progress
    from slipstream.engine.engine_process import EngineProcess
    from slipstream.engine.liveness import LivenessLimits
    from slipstream.engine.sockets import Endpoint


class EngineService:
    """One engine as its doors see it. `close` stops it."""

    def __init__(
        self,
        info: EngineInfo,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        *,
        assembly: Assembly | None = None,
        owner: EngineProcess | None = None,
    ) -> None:
        self.info = info
        self.prompts = PromptEncoder(tokenizer)
        # The engine itself, where it is in this process, or the process that is this service's to end.
        self.assembly = assembly
        self.owner = owner
        self.service_id = f"llm-{uuid.uuid4().hex[:12]}"
        self._holds_collector = False
        self._has_tokenizer = tokenizer is not None
        self._ordinals = itertools.count()
        self._processor = OutputProcessor(tokenizer, stream_interval=info.stream_interval)
        self._pump = Pump(client, self._processor)

    @property
    def client(self) -> EngineClient:
        return self._pump.client

    @property
    def counts(self) -> RequestCounts:
        """What the outputs made here came to so far; grows while it is read."""
        return self._processor.counts

    @property
    def after_batch(self) -> Callable[[], None] | None:
        """Called once after the listeners of each batch of events, so that a server wakes its loop once."""
        return self._pump.after_batch

    @after_batch.setter
    def after_batch(self, hook: Callable[[], None] | None) -> None:
        self._pump.after_batch = hook

    def create_request(
        self,
        encoded: Encoded,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        options: RequestOptions | None = None,
        change: Callable[[Request], Request] | None = None,
    ) -> Request:
        """Check a prompt and its parameters against the engine's limits. Raises RequestError.

        Without a `request_id` it gets one of its own; `change` returns the request as it is to be sent.
        """
        if encoded.error is not None:
            raise encoded.error
        ordinal, seed = next(self._ordinals), self.info.seed
        request = Request.create(
            encoded.token_ids,
            params,
            self.info.limits,
            request_id=request_id or f"{self.service_id}-{ordinal}",
            prompt=encoded.text,
            default_seed=None if seed is None else (seed + ordinal) % 2**63,
            options=options,
            encode_bad=self.prompts.encode_bad if self._has_tokenizer else None,
        )
        if request.stop and not self._has_tokenizer:
            raise RequestError(
                "stop strings need a tokenizer, and this LLM has none; use stop_token_ids.",
                param="stop",
            )
        return request if change is None else change(request)

    def submit(self, request: Request, listener: Listener, *, streams: Streams = False) -> None:
        """Queue a request; its `listener` gets every update (`streams`) or only the last.

        With "delta" an update holds only what is new. The samples of a request may then come one by one.

        Raises RequestError where the request cannot be taken, EngineError where the engine has stopped.
        """
        self._pump.submit([(request, listener)], streams=streams)

    def submit_batch(self, requests: Sequence[tuple[Request, Listener]]) -> None:
        """Queue requests together, all or none, each for its last output."""
        self._pump.submit(requests)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sample of it. Idempotent; unknown ids are ignored."""
        self._pump.client.abort(request_id, index)

    def command(self, name: str, **arguments: Any) -> Future[Any]:
        """Run a command of the engine by name between two steps; see `engine.control`.

        Raises ConfigError for a name or an argument that it does not take, EngineError where it has stopped.
        """
        return self._pump.command(name, arguments)

    def stats(self) -> Future[dict[str, Any]]:
        """Return the engine's counters, all of one moment between two steps, and how outputs ended."""
        try:
            asked = self._pump.command("stats", {})
        except EngineError:
            # No thread steps the engine any more, or it is this one.
            asked = Future[dict[str, Any]]()
            asked.set_result(self._pump.client.last_stats())
        merged: Future[dict[str, Any]] = Future()
        asked.add_done_callback(lambda done: self._merge(done, merged))
        return merged

    def _merge(self, done: Future[dict[str, Any]], merged: Future[dict[str, Any]]) -> None:
        if not merged.set_running_or_notify_cancel():
            return
        try:
            merged.set_result({**done.result(), "finish_reasons": dict(self._processor.finish_reasons)})
        except Exception as error:
            merged.set_exception(error)

    def health(self) -> Health:
        """Say whether the engine makes progress; never waits for it."""
        return self._pump.health()

    def hold_collector(self) -> None:
        """Leave what is there now out of Python's collections until `close`."""
        self._holds_collector = True
        FROZEN.hold()

    def close(self) -> None:
        """Stop the engine; pending requests fail with code "engine_stopped". Idempotent."""
        self._pump.stop()
        self.prompts.close()
        if self._holds_collector:
            self._holds_collector = False
            FROZEN.release()
        if self.owner is not None:
            self.owner.stop()


def local_service(
    config: EngineConfig,
    *,
    progress: Progress | None = None,
    max_step_s: float = DEFAULT_MAX_STEP_S,
) -> EngineService:
    """Load a model and run its engine on a thread of this process; blocks until the weights are loaded.

    Raises ConfigError, CheckpointError or OutOfMemoryError where the engine cannot start.
    """
    from slipstream.engine.assembly import assemble
    from slipstream.engine.control import EngineControl

    assembly = assemble(config, progress=progress)
    commands = EngineControl(assembly, config).commands()
    client = InProcessClient(assembly.engine, commands, max_step_s=max_step_s)
    service = EngineService(info_of(assembly, config), client, assembly.tokenizer, assembly=assembly)
    if assembly.resolved.device.startswith("cuda"):
        # A full collection takes as long as ten steps of a GPU, which would have nothing to do.
        service.hold_collector()
    return service


def process_service(config: EngineConfig, *, awaits_restart: bool = False, **options: Any) -> EngineService:
    """Start an engine in a process of its own and connect to it; `close` ends the process too.

    `options` are those of `engine.engine_process.EngineProcess`. Raises as `local_service` does, and
    EngineError where the process ended.
    """
    from slipstream.engine.engine_process import start_engine_process

    process = start_engine_process(config, restart=awaits_restart, **options)
    try:
        service = connect_service(
            process.endpoint, awaits_restart=awaits_restart, limits=options.get("limits"), owner=process
        )
    except BaseException:
        process.stop()
        raise
    return service


def connect_service(
    endpoint: Endpoint,
    *,
    awaits_restart: bool = False,
    limits: LivenessLimits | None = None,
    owner: EngineProcess | None = None,
) -> EngineService:
    """Connect to an engine that listens at an endpoint, and read its tokenizer here.

    With `awaits_restart` whoever owns the engine starts it again when it ends; `close` ends an `owner`.
    Raises EngineError where no engine answers, ConfigError where its tokenizer is in no file.
    """
    from slipstream.engine.assembly import read_tokenizer
    from slipstream.engine.process_client import ProcessClient

    client = ProcessClient(endpoint, awaits_restart=awaits_restart, limits=limits)
    try:
        source = client.info.tokenizer
        tokenizer = None if source is None else read_tokenizer(source.config())
    except BaseException:
        client.close()
        raise
    return EngineService(client.info, client, tokenizer, owner=owner)
