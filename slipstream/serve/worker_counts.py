"""What have all API workers of a server counted together? Each writes its numbers where all can read them.

A worker writes one small file a second into a folder of the server's; whoever is asked for metrics adds up
the files of the others and its own numbers of now. Counters of a worker that is gone go on counting, so that
sums never fall; its gauges do not. So a scrape may reach any worker, and what it says of the others is at
most `PUBLISH_S` old.
Invariant: what cannot be read counts as nothing; a scrape never fails for it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from slipstream.engine.request_counts import RequestCounts

logger = logging.getLogger(__name__)

PUBLISH_S = 1.0
# A worker that has not written for so long is gone.
LIVE_S = 10.0
MAX_FILE_BYTES = 1 << 20


class WorkerCounts(msgspec.Struct):
    """One worker's numbers, or the sum. `http` counts answers by "route method status".

    `num_held_requests` and `num_held_tokens` are what admission holds now, `max_held_*` its bounds.
    """

    written_s: float = 0.0
    requests: RequestCounts = msgspec.field(default_factory=RequestCounts)
    http: dict[str, int] = {}
    num_refused: int = 0
    num_held_requests: int = 0
    num_held_tokens: int = 0
    max_held_requests: int = 0
    max_held_tokens: int = 0

    def merge(self, other: WorkerCounts, *, is_live: bool) -> None:
        self.requests.merge(other.requests)
        for key, count in other.http.items():
            self.http[key] = self.http.get(key, 0) + count
        self.num_refused += other.num_refused
        if is_live:
            self.num_held_requests += other.num_held_requests
            self.num_held_tokens += other.num_held_tokens
            self.max_held_requests += other.max_held_requests
            self.max_held_tokens += other.max_held_tokens


class CountsFolder:
    """One worker's place in the folder. `publish` is called by one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"worker-{uuid.uuid4().hex}.json"

    def publish(self, counts: WorkerCounts) -> None:
        """Replace this worker's file. Raises OSError where the folder is gone or the disk is full."""
        counts.written_s = time.time()
        draft = self._own.with_suffix(".tmp")
        draft.write_bytes(msgspec.json.encode(counts))
        os.replace(draft, self._own)

    def total(self, own: WorkerCounts) -> WorkerCounts:
        """Return the sum of `own` and all other workers."""
        found = WorkerCounts()
        found.merge(own, is_live=True)
        now = time.time()
        for path in sorted(self._folder.glob("worker-*.json")):
            other = None if path == self._own else _read(path)
            if other is not None:
                found.merge(other, is_live=abs(now - other.written_s) < LIVE_S)
        return found


def _read(path: Path) -> WorkerCounts | None:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_FILE_BYTES), type=WorkerCounts)
    except (OSError, msgspec.MsgspecError):
        logger.warning("the counts in %s cannot be read", path.name)
        return None


class Publisher:
    """A thread that publishes once in `PUBLISH_S`, and once more when it is closed."""

    def __init__(self, folder: CountsFolder, read: Callable[[], WorkerCounts]) -> None:
        self._folder = folder
        self._read = read
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slipstream-counts", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        has_failed = False
        while True:
            is_last = self._is_closing.is_set()
            try:
                self._folder.publish(self._read())
                has_failed = False
            except OSError as error:
                # Once is enough: a full disk stays full, and serving goes on.
                if not has_failed:
                    logger.warning("counts cannot be written for the other workers: %s", error.strerror)
                has_failed = True
            if is_last:
                return
            self._is_closing.wait(PUBLISH_S)

    def close(self) -> None:
        self._is_closing.set()
        self._thread.join()
