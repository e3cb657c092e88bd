"""How does a server run as processes? One that answers and an engine, or a supervisor over several.

Invariant: the socket is bound before anything else is started, so that a server which cannot listen costs no
load; and when `run_server` returns or raises, nothing it started is left.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from slipstream.engine.config import EngineConfig
from slipstream.engine.engine_info import EngineInfo
from slipstream.serve.listening import address_of, listen, raise_file_limit
from slipstream.serve.settings import ServeSettings

Progress = Callable[[str, float], None]
OnListening = Callable[[str], None]
OnReady = Callable[[str, EngineInfo], None]


def run_server(
    settings: ServeSettings,
    config: EngineConfig,
    *,
    on_listening: OnListening = lambda address: None,
    on_progress: Progress | None = None,
    on_ready: OnReady = lambda address, info: None,
) -> int:
    """Serve until the end; returns the exit code.

    Raises ConfigError, CheckpointError, OutOfMemoryError or EngineError where it cannot start.
    """
    raise_file_limit(settings.max_connections)
    listening = listen(settings)
    try:
        address = address_of(listening, settings)
        on_listening(address)
        if settings.api_workers > 1:
            from slipstream.serve.supervisor import Supervisor

            supervisor = Supervisor(settings, config, listening, on_progress=on_progress)
            return supervisor.run(lambda info: on_ready(address, info))
        return _run_one(settings, config, listening, on_progress, lambda info: on_ready(address, info))
    finally:
        listening.close()
        if settings.uds is not None and os.path.exists(settings.uds):
            os.unlink(settings.uds)


def _run_one(
    settings: ServeSettings,
    config: EngineConfig,
    listening: socket.socket,
    on_progress: Progress | None,
    on_ready: Callable[[EngineInfo], None],
) -> int:
    # After the socket is bound: these take a second.
    from slipstream.serve.engine_host import ChildHost, EngineHost, InProcessHost
    from slipstream.serve.server import ApiServer

    host: EngineHost = InProcessHost(config, settings) if settings.in_process else ChildHost(config, settings)
    server = ApiServer(
        settings,
        host,
        listening,
        model_names=settings.served_model_names,
        on_progress=on_progress,
        on_ready=on_ready,
    )
    return server.run()
