"""What do tests of a server's life talk to? `slipstream serve` as people start it, and its processes."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.serve.oracle import DEADLINE_S, Target, tree_of

ROOT = Path(__file__).resolve().parent.parent.parent
ADDRESS = re.compile(r"listening at (https?://[\w.:\[\]]+)")
# Starting imports torch in two processes.
START_S = 120.0


class LiveServer:
    """A server's process, what it has said, and where it listens."""

    def __init__(self, model: Path, *options: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "slipstream",
                "serve",
                str(model),
                "--port",
                "0",
                "--device",
                "cpu",
                *options,
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._has_line = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()
        self._family: set[int] = set()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._has_line:
                self.lines.append(line.rstrip("\n"))
                self._has_line.notify_all()

    def wait_line(self, pattern: str, *, timeout_s: float = START_S) -> re.Match[str]:
        """Return the first match in what the server says, waiting for it."""
        deadline = time.monotonic() + timeout_s
        with self._has_line:
            while True:
                for line in self.lines:
                    if match := re.search(pattern, line):
                        return match
                left = deadline - time.monotonic()
                assert left > 0 and self.process.poll() is None, "\n".join(self.lines)
                self._has_line.wait(min(left, 0.2))

    @property
    def url(self) -> str:
        return self.wait_line(ADDRESS.pattern)[1]

    def wait_ready(self) -> LiveServer:
        self.wait_line(r"^serving ")
        self.remember()
        return self

    def remember(self) -> None:
        """Note which processes there are now, to look for them when they should be gone."""
        self._family = set(tree_of(self.process.pid))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=DEADLINE_S, **options)

    def target(self, **options: Any) -> Target:
        return Target(url=self.url, pids=lambda: tree_of(self.process.pid), **options)

    def child(self, module: str) -> psutil.Process:
        """Return the process that runs a module."""
        found = running(module, self.process.pid)
        assert found, f"no process runs {module}"
        return found[0]

    def wait_end(self, *, timeout_s: float = DEADLINE_S) -> int:
        return self.process.wait(timeout_s)

    def assert_nothing_left(self) -> None:
        """Assert that no process that was seen after the start is alive."""
        _, alive = psutil.wait_procs(
            [psutil.Process(pid) for pid in self._family if psutil.pid_exists(pid)], timeout=DEADLINE_S / 2
        )
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for pid in reversed(tree_of(self.process.pid)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()
        self.process.wait(DEADLINE_S)


def running(module: str, pid: int) -> list[psutil.Process]:
    """Return the processes below `pid` that run a module, without those that have ended."""
    found: list[psutil.Process] = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if module in process.cmdline():
                found.append(process)
    return found


@contextlib.contextmanager
def live(model: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[LiveServer]:
    """Start a server, ready or not yet, and end whatever is left of it."""
    server = LiveServer(model, *options, env=env)
    try:
        yield server
    finally:
        server.close()


def wait_until(is_true: Any, *, timeout_s: float = DEADLINE_S, what: str = "") -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, what or "it never came to be"
        time.sleep(0.02)


def statuses(server: LiveServer, paths: Sequence[str]) -> dict[str, int]:
    return {path: server.get(path).status_code for path in paths}
