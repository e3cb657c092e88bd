"""Who starts, watches and ends the process that renders templates?

An in-process Jinja rendering cannot be interrupted, so it happens in a child that can be killed. Invariant:
every call returns or raises by its deadline, and a child that missed it is dead and reaped by then; the next
call starts a fresh one. One child per template, started on first use; calls take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

# The interpreter and Jinja take 0.2 s to start, more on a busy machine.
START_S = 20.0


class TemplateProcessError(Exception):
    """The child gave no answer; the message says why."""


class TemplateProcess:
    """A child rendering one template."""

    def __init__(self, source: str, *, deadline_s: float, max_output: int) -> None:
        self._settings = {"source": source, "deadline_s": deadline_s, "max_output": max_output}
        self._deadline_s = deadline_s
        # Escaped, a character takes at most twelve; beyond that, the child no longer keeps to its limit.
        self._max_line = 12 * max_output + 4096
        self._lock = threading.Lock()
        self._child: Child | None = None

    def call(self, variables: dict[str, Any]) -> dict[str, str]:
        """Return the child's answer. Raises TemplateProcessError where it gave none in time."""
        line = json.dumps(variables)
        with self._lock:
            child = self._child
            if child is None or not child.is_usable():
                self.discard()
                child = self._child = self._start()
            try:
                return child.exchange(line, self._deadline_s, self._max_line)
            except TemplateProcessError:
                self.discard()
                raise

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self.discard()

    def discard(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _start(self) -> Child:
        child = Child()
        try:
            child.exchange(None, START_S, self._max_line)
        except TemplateProcessError:
            child.end()
            raise
        child.write(json.dumps(self._settings))
        return child

    @property
    def pid(self) -> int | None:
        """The running child's process id."""
        return None if self._child is None else self._child.process.pid


class Child:
    """One process and its two pipes. Not thread-safe."""

    def __init__(self) -> None:
        # A session of its own: Ctrl-C on the terminal must not reach it before it can ignore the signal.
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "slipstream.text.template_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=child_environment(),
                start_new_session=True,
                text=True,
                encoding="ascii",
            )
        except OSError as error:
            raise TemplateProcessError(f"its process cannot be started ({error.strerror})") from error
        self._owner = os.getpid()
        self._expired = False
        self.end = weakref.finalize(self, end_process, self.process, self._owner)

    def is_usable(self) -> bool:
        """Whether the child lives, is this process's own (not one inherited by a fork) and in step."""
        return self._owner == os.getpid() and not self._expired and self.process.poll() is None

    def exchange(self, line: str | None, deadline_s: float, max_line: int) -> dict[str, str]:
        """Write a line, if there is one, and return the answer; the child is killed at the deadline."""
        timer = threading.Timer(deadline_s, self._expire)
        timer.daemon = True
        timer.start()
        try:
            if line is not None:
                self.write(line)
            assert self.process.stdout is not None
            answer = self.process.stdout.readline(max_line)
        finally:
            timer.cancel()
        if answer.endswith("\n"):
            return json.loads(answer)
        if self._expired:
            raise TemplateProcessError(f"it did not finish within {deadline_s:g} s")
        raise TemplateProcessError("its process ended; the template may need too much memory or time")

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return  # the missing answer tells why

    def _expire(self) -> None:
        self._expired = True
        self.process.kill()


def end_process(process: subprocess.Popen[str], owner: int) -> None:
    """Kill and reap the child, unless a fork inherited it."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue
    if owner == os.getpid():
        process.kill()
        process.wait()


def child_environment() -> dict[str, str]:
    """Return what a Python process needs and nothing else: no keys or tokens of the parent's."""
    kept = ("PATH", "SYSTEMROOT", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["PYTHONIOENCODING"] = "ascii"
    return environment
