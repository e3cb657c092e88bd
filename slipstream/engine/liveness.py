"""Does an engine's process still get anywhere? Judged from its heartbeat and its process, never by asking it.

A silent process (stopped, or no thread of it runs) and one whose step does not end are "stuck", and come back
if they do; after `kill_after_s` more they count as lost. A process that has ended is "stopped".
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import psutil

from slipstream.engine.health import DEFAULT_MAX_STEP_S, Health
from slipstream.engine.sockets import Endpoint, connect_heartbeat, load_zmq
from slipstream.engine.wire import Heartbeat, WireError, decode_down

# Asking the system about a process takes 0.1 ms.
PROCESS_CHECK_S = 0.25


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LivenessLimits:
    """How long, in seconds, a step may take, a process be silent, and be stuck before it is killed."""

    max_step_s: float = DEFAULT_MAX_STEP_S
    max_silence_s: float = 4.0
    kill_after_s: float = 15.0


class Liveness:
    """One process's pulse. `listen` belongs to one thread; the rest may be read from any."""

    def __init__(self, endpoint: Endpoint, pid: int, limits: LivenessLimits) -> None:
        self._zmq = load_zmq()
        self._limits = limits
        self._process = process_of(pid)
        self._context = self._zmq.Context()
        self.socket: Any = connect_heartbeat(self._context, endpoint)
        self._beat: Heartbeat | None = None
        self._heard_s = time.monotonic()
        self._checked_s = 0.0
        self._stuck_since_s: float | None = None
        self._is_dead = self._process is None

    @property
    def beat(self) -> Heartbeat | None:
        return self._beat

    def listen(self, timeout_s: float) -> None:
        """Take in heartbeats for up to `timeout_s` and look at the process."""
        if self.socket.poll(timeout_s * 1000):
            self.take()
        self.look()

    def look(self) -> None:
        """Look at the process, no more often than is worth it, and at how long it has been stuck."""
        now = time.monotonic()
        if now - self._checked_s >= PROCESS_CHECK_S:
            self._checked_s = now
            self._is_dead = self._process is None or not is_alive(self._process)
        is_stuck = self._obstacle(now) != ""
        if not is_stuck:
            self._stuck_since_s = None
        elif self._stuck_since_s is None:
            self._stuck_since_s = now

    def take(self) -> None:
        """Take in the heartbeats that have arrived."""
        zmq = self._zmq
        while True:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                _, beat = decode_down(frame)
            except WireError:
                continue
            if isinstance(beat, Heartbeat):
                self._beat, self._heard_s = beat, time.monotonic()

    def _obstacle(self, now: float) -> str:
        """Say what keeps the engine from its work, "" where nothing does."""
        silent_s, beat = now - self._heard_s, self._beat
        if silent_s > self._limits.max_silence_s:
            return f"The engine's process has not been heard for {silent_s:.1f} s."
        if beat is not None and beat.stalled_s > self._limits.max_step_s:
            return f"A step has taken {beat.stalled_s:.0f} s so far."
        return ""

    @property
    def is_dead(self) -> bool:
        """Say whether the process had ended when it was last looked at."""
        return self._is_dead

    @property
    def is_lost(self) -> bool:
        """Say whether it has been stuck for so long that it will not come back."""
        since = self._stuck_since_s
        return since is not None and time.monotonic() - since > self._limits.kill_after_s

    def health(self) -> Health:
        beat = self._beat
        num_steps = 0 if beat is None else beat.num_steps
        if self._is_dead:
            return Health("stopped", "The engine's process has ended.", num_steps)
        obstacle = self._obstacle(time.monotonic())
        if obstacle:
            return Health("stuck", obstacle, num_steps)
        if beat is not None and beat.refusal:
            return Health("asleep", beat.refusal, num_steps)
        return Health("ready", "", num_steps)

    def close(self) -> None:
        if not self.socket.closed:
            self.socket.close()
            self._context.term()


def process_of(pid: int) -> psutil.Process | None:
    """Return a process of this machine, or None where there is none of that number."""
    with contextlib.suppress(psutil.Error, ValueError, OverflowError):
        return psutil.Process(pid)
    return None


def is_alive(process: psutil.Process) -> bool:
    """Say whether it runs: one that has ended and was not waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
