"""What does one of several API workers do, from its first line to its last?

Its supervisor gives it the listening socket and, on standard input, its order and then news of the engines.
Invariant: it does not outlive its supervisor, whose end closes the pipe.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from pathlib import Path

import msgspec

from slipstream.core.collector import freeze_collector
from slipstream.core.errors import SlipstreamError
from slipstream.serve.engine_host import ConnectedHost
from slipstream.serve.listening import raise_file_limit
from slipstream.serve.log_format import configure_server_log
from slipstream.serve.server import ApiServer, WorkerPlace
from slipstream.serve.worker_orders import WORKER_READY, EnginesReady, Loading, News, WorkerOrder

logger = logging.getLogger(__name__)

EXIT_ORPHANED = 3


def run_worker() -> int:
    """Be one API worker; returns the exit code."""
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerOrder)
    settings = order.settings
    configure_server_log(as_json=settings.log_json)
    raise_file_limit(settings.max_connections)
    if os.getppid() != order.parent_pid:
        return EXIT_ORPHANED
    host = ConnectedHost(settings)
    threading.Thread(target=_listen, args=(host,), name="slipstream-supervisor", daemon=True).start()
    server = ApiServer(
        settings,
        host,
        socket.socket(fileno=order.listening_fd),
        model_names=settings.served_model_names,
        place=WorkerPlace(order.num_workers, Path(order.counts_folder)),
        on_ready=lambda info: _say_ready(),
    )
    try:
        return server.run()
    except SlipstreamError as error:
        logger.error("an API worker did not start: %s", error)
        return 1


def _say_ready() -> None:
    freeze_collector()
    sys.stdout.buffer.write(WORKER_READY)
    sys.stdout.buffer.flush()


def _listen(host: ConnectedHost) -> None:
    """Take in news until the supervisor is gone."""
    for line in iter(sys.stdin.buffer.readline, b""):
        match msgspec.json.decode(line, type=News):
            case Loading(what, share):
                host.tell_progress(what, share)
            case EnginesReady(endpoints):
                host.tell(endpoints)
    # Nobody is left who would end this process.
    os._exit(EXIT_ORPHANED)


if __name__ == "__main__":
    code = run_worker()
    sys.stdout.flush()
    # Threads of libraries, and a load that hangs, must not hold the end up.
    os._exit(code)
