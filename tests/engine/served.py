"""Which engines do tests put behind sockets? The fake device's, served by a thread or by a process.

What a request generates there is a function of its tokens and seed alone (`fake_runner.lone_output`), so
every stream has its expected content, whatever happens to the others.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from slipstream.cache.groups import resolve
from slipstream.cache.kv_cache import KvCache
from slipstream.core.outputs import RequestOutput
from slipstream.core.plan import StepResult
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.client import Command, InProcessClient
from slipstream.engine.engine import Engine
from slipstream.engine.engine_info import EngineInfo
from slipstream.engine.engine_server import EngineServer
from slipstream.engine.liveness import LivenessLimits
from slipstream.engine.process_client import ProcessClient
from slipstream.engine.prompts import Encoded
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.service import EngineService
from slipstream.engine.sockets import Endpoint, make_endpoint, private_folder
from tests.engine.fake_runner import LIMITS, VOCAB_SIZE, FakeRunner, Step, full, lone_output

# Catches a hang only; what is tested takes milliseconds, or as long as a test says.
DEADLINE_S = 30.0
BLOCK_TOKENS = 8
INFO = EngineInfo(
    model="fake",
    version="0",
    limits=LIMITS,
    max_batch_size=64,
    max_num_tokens=2048,
    num_pages=4000,
    tokens_per_block=BLOCK_TOKENS,
    device="cpu",
    dtype="float32",
    quantization="unquantized",
    report=["a fake"],
    default_sampling={},
)


class ServedRunner(FakeRunner):
    """The fake device, at its own pace."""

    step_s = 0.0

    def collect(self, step: Step) -> StepResult:
        if self.step_s:
            time.sleep(self.step_s)
        return super().collect(step)


def stats(engine: Engine) -> dict[str, Any]:
    scheduler = engine.scheduler
    return {
        "num_running": scheduler.num_running,
        "num_waiting": scheduler.num_waiting,
        "num_free_pages": scheduler.cache.pool.num_free,
        "num_pages": scheduler.cache.pool.num_usable,
    }


def fake_client(*, num_pages: int = 4001, max_batch_size: int = 64, step_s: float = 0.0) -> InProcessClient:
    """Return an engine over the fake device, with commands that break it."""
    groups = resolve(full(), block_tokens=BLOCK_TOKENS, element_bytes=4)
    cache = KvCache(groups, num_pages)
    scheduler = Scheduler(cache, max_batch_size=max_batch_size, max_num_tokens=2048)
    runner = ServedRunner(groups, num_pages)
    runner.step_s = step_s
    commands = {
        "stats": Command(stats),
        "echo": Command(lambda engine, **values: values),
        "hang": Command(lambda engine, seconds: time.sleep(seconds)),
        "die": Command(lambda engine: os._exit(7)),
        "idle": Command(lambda engine: engine.scheduler.num_running, when_idle=True),
        "fail": Command(lambda engine: 1 / 0),
        "object": Command(lambda engine: engine),
    }
    return InProcessClient(Engine(scheduler, runner, depth=2), commands)  # type: ignore[arg-type]


@contextlib.contextmanager
def serving(client: InProcessClient | None = None, *, use_tcp: bool = False) -> Iterator[EngineServer]:
    """Serve an engine by a thread of this process; at the end no door and no page may be left."""
    client = client or fake_client()
    folder = None if use_tcp else private_folder()
    server = EngineServer(client, INFO, make_endpoint(folder))

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # a test's own, which every door hears of
            server.run()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server
        eventually(lambda: not client.engine.has_work, "the engine never came to rest")
        pool = client.engine.scheduler.cache.pool
        assert pool.num_free == pool.num_usable
        pool.check()
    finally:
        with contextlib.suppress(OSError):  # it has ended by itself
            server.stop()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        if folder is not None:
            for name in folder.iterdir():
                name.unlink()
            folder.rmdir()


@contextlib.contextmanager
def door(endpoint: Endpoint, **options: Any) -> Iterator[EngineService]:
    """Connect to a served engine, without a tokenizer."""
    options.setdefault("limits", LivenessLimits())
    client = ProcessClient(endpoint, **options)
    service = EngineService(client.info, client, None)
    try:
        yield service
    finally:
        service.close()


def eventually(holds: Callable[[], object], message: str, *, deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < deadline, message
        time.sleep(0.005)


class Stream:
    """One request of a door and what has come of it."""

    def __init__(
        self, service: EngineService, prompt: Sequence[int], max_tokens: int, *, n: int = 1, **more: Any
    ) -> None:
        params = SamplingParams(max_tokens=max_tokens, n=n, seed=7, detokenize=False)
        self.service = service
        self.request: Request = service.create_request(Encoded(list(prompt)), params, **more)
        self.outputs: list[RequestOutput] = []
        self.is_done = threading.Event()
        self.has_begun = threading.Event()
        service.submit(self.request, self._take, streams=True)

    def _take(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        self.has_begun.set()
        if output.finished:
            self.is_done.set()

    def begin(self) -> Stream:
        assert self.has_begun.wait(DEADLINE_S), "no token came"
        return self

    def wait(self, deadline_s: float = DEADLINE_S) -> RequestOutput:
        assert self.is_done.wait(deadline_s), f"{self.request.request_id} never ended"
        return self.outputs[-1]

    def check(self) -> None:
        """Assert that every sample is exactly what it would be alone."""
        output = self.wait()
        assert output.error is None, output.error
        for sample, shown in zip(self.request.samples(), output.outputs, strict=True):
            assert shown.token_ids == lone_output(sample)

    def abort(self) -> None:
        self.service.abort(self.request.request_id)


def prompt(seed: int, length: int = 12) -> list[int]:
    return [2 + (seed * 7919 + 31 * i) % (VOCAB_SIZE - 2) for i in range(length)]
