"""What must hold after any bad input or fault? The oracle that the tests of reliability share.

    with oracle.watching():
        answer = client.post(...)
        oracle.check(answer)

Around a fault it asserts: client faults are 4xx in OpenAI's error shape and server faults 5xx, with nothing
of the inside in body or headers; the processes are the same; four greedy streams that run beside it keep
their text, token by token; afterwards the engine is idle, free pages, open files, threads, shared memory and
resident memory are back where they were, a canary is answered as before, and `/health` agrees with it.
It works on an application in this process and on a server's own processes; every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

# Catches a hang only: the machine may be busy with other tests.
DEADLINE_S = 60.0
SETTLE_S = 30.0
NUM_VICTIMS = 4
VICTIM_PROMPTS = ("ba de fi", "lo mu", "one two three", "ta te ti to tu")
VICTIM_TOKENS = 24
CANARY = "ca na ry"
# Allocators keep some megabytes back; what leaks per request is seen over many of them.
MAX_GROWTH_BYTES = 48 << 20
# Pools of a bounded size get their threads when they are first needed: 4 and 6 of them in a server.
MAX_POOL_THREADS = 10
LEAKS = re.compile(
    r"Traceback|site-packages|\.py\b|0x[0-9a-f]{6,}|/(?:home|root|tmp|usr|work|var|proc)/|File \"",
    re.IGNORECASE,
)


@dataclasses.dataclass(kw_only=True)
class Target:
    """A server to watch: where it is, its key, the processes that it consists of, and what its engine says.

    `free_pages` returns (free, all) pages where they can be seen from here.
    """

    url: str
    model: str
    headers: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    pids: Callable[[], Sequence[int]] = lambda: [os.getpid()]
    free_pages: Callable[[], tuple[int, int]] | None = None
    secrets: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a server holds of the system."""

    pids: tuple[int, ...]
    num_files: int
    num_threads: int
    num_segments: int
    resident: int


def tree_of(pid: int) -> list[int]:
    """Return a process and all that it started, in order."""
    process = psutil.Process(pid)
    return sorted([pid, *(child.pid for child in process.children(recursive=True))])


class Oracle:
    """Watches one target."""

    def __init__(self, target: Target) -> None:
        self.target = target
        with self.client() as client:
            self.baseline = [self.complete(client, prompt) for prompt in VICTIM_PROMPTS]
            self.canary = self.complete(client, CANARY)
        assert len({*self.baseline, self.canary}) == NUM_VICTIMS + 1, "texts that are alike prove nothing"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.target.url, headers=self.target.headers, timeout=DEADLINE_S)

    def body(self, prompt: str, **changes: Any) -> dict[str, Any]:
        fixed = {
            "model": self.target.model,
            "temperature": 0,
            "max_tokens": VICTIM_TOKENS,
            "ignore_eos": True,
        }
        return {**fixed, "prompt": prompt, **changes}

    def complete(self, client: httpx.Client, prompt: str) -> str:
        answer = client.post("/v1/completions", json=self.body(prompt))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def stream(self, client: httpx.Client, prompt: str) -> str:
        """Return the text of a stream that must come to its end."""
        text, ends = "", 0
        with client.stream("POST", "/v1/completions", json=self.body(prompt, stream=True)) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    assert not line, line
                    continue
                if line == "data: [DONE]":
                    ends += 1
                    continue
                choice = json.loads(line[6:])["choices"][0]
                text += choice["text"]
        assert ends == 1
        return text

    def check(self, answer: httpx.Response, *, status: int | None = None, foreign: Sequence[str] = ()) -> Any:
        """Assert that an answer is a refusal or a failure as it should look; returns its `error`.

        `foreign` are texts of others, which must not show in it.
        """
        if status is not None:
            assert answer.status_code == status, (answer.status_code, answer.text)
        assert 400 <= answer.status_code < 600, (answer.status_code, answer.text)
        body = answer.json()
        assert set(body) == {"error"}, body
        assert set(body["error"]) == {"message", "type", "param", "code"}, body
        assert isinstance(body["error"]["message"], str) and body["error"]["message"]
        self.check_quiet(answer, foreign)
        return body["error"]

    def check_quiet(self, answer: httpx.Response, foreign: Sequence[str] = ()) -> None:
        """Assert that nothing of the inside shows in an answer."""
        shown = answer.text + "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
        assert not LEAKS.search(shown), shown
        for secret in (*self.target.secrets, *foreign):
            assert secret not in shown

    def footprint(self) -> Footprint:
        pids = tuple(self.target.pids())
        processes = [psutil.Process(pid) for pid in pids]
        shared = Path("/dev/shm")
        return Footprint(
            pids=pids,
            num_files=sum(process.num_fds() for process in processes),
            num_threads=sum(process.num_threads() for process in processes),
            num_segments=len(list(shared.iterdir())) if shared.is_dir() else 0,
            resident=sum(process.memory_info().rss for process in processes),
        )

    @contextlib.contextmanager
    def watching(self, *, max_growth: int = MAX_GROWTH_BYTES) -> Iterator[None]:
        """Run victims beside the block, and check everything after it."""
        self.wait_idle()
        before = self.footprint()
        victims = Victims(self)
        try:
            yield
        finally:
            victims.stop()
        assert victims.num_done >= NUM_VICTIMS and not victims.failures, victims.failures
        self.wait_idle()
        with self.client() as client:
            self.check_canary(client)
        self.check_restored(before, max_growth)

    def check_canary(self, client: httpx.Client) -> None:
        started = time.monotonic()
        assert self.complete(client, CANARY) == self.canary
        assert time.monotonic() - started < DEADLINE_S
        health = client.get("/health")
        assert health.status_code == 200 and health.json()["status"] == "ok", health.text

    def check_restored(self, before: Footprint, max_growth: int) -> None:
        after = self._settled(before)
        assert after.pids == before.pids
        assert after.num_files <= before.num_files, (before, after)
        assert after.num_threads <= before.num_threads + MAX_POOL_THREADS, (before, after)
        assert after.num_segments <= before.num_segments, (before, after)
        assert after.resident - before.resident < max_growth, (before, after)

    def _settled(self, before: Footprint) -> Footprint:
        """Return the footprint once connections that were closed are gone, or the last one in time."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            after = self.footprint()
            max_threads = before.num_threads + MAX_POOL_THREADS
            is_back = after.num_files <= before.num_files and after.num_threads <= max_threads
            if (is_back and after.num_segments <= before.num_segments) or time.monotonic() > deadline:
                return after
            time.sleep(0.05)

    def wait_idle(self) -> None:
        """Wait until nothing is held, and assert that every page is free then."""
        deadline = time.monotonic() + DEADLINE_S
        with self.client() as client:
            while True:
                gauges = read_gauges(client)
                if not any(gauges.values()):
                    break
                assert time.monotonic() < deadline, gauges
                time.sleep(0.05)
        if self.target.free_pages is not None:
            free, total = self.target.free_pages()
            assert free == total, (free, total)


class Victims:
    """Streams that run until they are told to stop, each comparing its text with the baseline."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._is_stopping = threading.Event()
        self.num_done = 0
        self.failures: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(NUM_VICTIMS)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        with self._oracle.client() as client:
            while True:
                try:
                    text = self._oracle.stream(client, VICTIM_PROMPTS[number])
                except Exception as error:
                    self.failures.append(f"victim {number}: {error!r}")
                    return
                if text != self._oracle.baseline[number]:
                    self.failures.append(f"victim {number}: {text!r}")
                self.num_done += 1
                if self._is_stopping.is_set():
                    return

    def stop(self) -> None:
        """Let each come to the end of its present stream."""
        self._is_stopping.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "a victim hangs"


GAUGES = ("num_requests_running", "num_requests_waiting", "num_requests_admitted", "kv_cache_usage_perc")


def read_gauges(client: httpx.Client) -> dict[str, float]:
    """Return what the server holds, by name, from `/metrics`."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    found: dict[str, float] = {}
    for line in answer.text.splitlines():
        name = line.partition("{")[0].removeprefix("slipstream:")
        if name in GAUGES:
            found[name] = float(line.rsplit(" ", 1)[1])
    assert set(found) == set(GAUGES), found
    return found
