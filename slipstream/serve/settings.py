"""What did the user say about the server? `ServeSettings` holds every option of it, checked at once.

Invariant: what exists as settings is consistent; what a machine adds to it (a port that is taken, a key file
that cannot be read) is found where it is used. Secrets never appear in a settings' representation.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re

from slipstream.core.errors import ConfigError
from slipstream.core.option_types import check_types
from slipstream.core.options import options

ON_ENGINE_FAILURE = ("exit", "restart")
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
KEY_TEXT = re.compile(r"[!-~]{1,512}")
MODEL_NAME = re.compile(r"[!-~]{1,256}")
HOST_NAME = re.compile(r"[A-Za-z0-9.-]{1,253}")
ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class ApiKey:
    """A secret that clients send, and the name under which it is counted and logged."""

    name: str
    secret: str = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if not KEY_NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name[:64]!r} is no name of a key; use letters, digits, '.', '_' and '-', at most 64."
            )
        if not KEY_TEXT.fullmatch(self.secret):
            raise ConfigError(
                f"The key {self.name!r} is not usable; it must be 1 to 512 printable ASCII characters "
                "without spaces."
            )


@options()
class ServeSettings:
    """Every option of a server; times are in seconds.

    Clients: each of `api_keys` opens all routes but the management routes, which exist only with
    `admin_keys`. Bounds of the queue count what waits beyond what the engine runs at once; a key may hold
    `per_key_share` of them while other keys want a place. With `header_timeout_s` a request's head must be
    complete, `idle_timeout_s` is how long an unused connection stays open, `slow_reader_timeout_s` how long
    a client may leave an answer unread. `request_timeout_s` bounds a request's life, queue included (None:
    it has no bound). `drain_timeout_s` is what SIGTERM leaves to answers that are under way. An engine
    whose step takes longer than `max_step_s` counts as stuck.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    api_keys: tuple[ApiKey, ...] = ()
    admin_keys: tuple[ApiKey, ...] = ()
    served_model_names: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    has_ui: bool = True
    has_docs: bool = False
    api_workers: int = 1
    num_engines: int = 1
    in_process: bool = False
    on_engine_failure: str = "exit"
    max_step_s: float = 120.0
    max_body_bytes: int = 16 * MIB
    max_header_bytes: int = 32 << 10
    max_headers: int = 100
    max_url_bytes: int = 8 << 10
    max_connections: int = 4096
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4 << 20
    max_fan_out: int = 1024
    per_key_share: float = 0.5
    header_timeout_s: float = 10.0
    idle_timeout_s: float = 75.0
    slow_reader_timeout_s: float = 30.0
    min_body_bytes_per_s: int = 256
    request_timeout_s: float | None = None
    drain_timeout_s: float = 30.0
    log_requests: bool = False
    log_json: bool = False
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        self._check_numbers()
        self._check_lists()
        if self.on_engine_failure not in ON_ENGINE_FAILURE:
            raise ConfigError(f"on_engine_failure={self.on_engine_failure!r}; valid: exit, restart.")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile belong together; give both or neither.")
        if self.uds is not None and self.ssl_certfile is not None:
            raise ConfigError("A unix socket has no TLS; leave out uds, or ssl_certfile and ssl_keyfile.")
        if self.in_process and (self.api_workers > 1 or self.num_engines > 1):
            raise ConfigError(
                "in_process=True runs one engine in the one server process; leave it out, or set "
                "api_workers=1 and num_engines=1."
            )
        if self.in_process and self.on_engine_failure == "restart":
            raise ConfigError(
                "on_engine_failure='restart' starts another engine process, and in_process=True has none; "
                "leave one of them out."
            )

    def _check_numbers(self) -> None:
        _check_range(self, "port", 0, 65535)
        _check_range(self, "api_workers", 1, 64)
        _check_range(self, "num_engines", 1, 64)
        _check_range(self, "max_body_bytes", 1024, 1 << 32)
        _check_range(self, "max_header_bytes", 1024, MIB)
        _check_range(self, "max_headers", 8, 10_000)
        _check_range(self, "max_url_bytes", 128, self.max_header_bytes)
        _check_range(self, "max_connections", 1, 1_000_000)
        _check_range(self, "max_queued_requests", 0, 1_000_000)
        _check_range(self, "max_queued_tokens", 0, 1 << 40)
        _check_range(self, "max_fan_out", 1, 100_000)
        _check_range(self, "per_key_share", 0.01, 1.0)
        _check_range(self, "min_body_bytes_per_s", 0, 1 << 30)
        for name in ("max_step_s", "header_timeout_s", "slow_reader_timeout_s"):
            _check_range(self, name, 0.05, 86_400.0)
        # uvicorn counts it in whole seconds.
        _check_range(self, "idle_timeout_s", 1.0, 86_400.0)
        _check_range(self, "drain_timeout_s", 0.0, 86_400.0)
        if self.request_timeout_s is not None:
            _check_range(self, "request_timeout_s", 0.001, 30 * 86_400.0)

    def _check_lists(self) -> None:
        for name in ("api_keys", "admin_keys"):
            keys: tuple[ApiKey, ...] = getattr(self, name)
            if len({key.name for key in keys}) < len(keys) or len({key.secret for key in keys}) < len(keys):
                raise ConfigError(f"{name}: a name or a key is given twice; give each once.")
        if {key.secret for key in self.api_keys} & {key.secret for key in self.admin_keys}:
            raise ConfigError("A key is both an API key and an admin key; use different ones.")
        for model in self.served_model_names:
            if not MODEL_NAME.fullmatch(model):
                raise ConfigError(
                    f"served_model_names: {model[:64]!r} must be 1 to 256 printable ASCII characters "
                    "without spaces."
                )
        for host in self.allowed_hosts:
            if not HOST_NAME.fullmatch(host):
                raise ConfigError(
                    f"allowed_hosts: {host[:64]!r} is no name of a host; write e.g. llm.example.org "
                    "(no port, no wildcard)."
                )
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"cors_origins: {origin[:64]!r} is no origin; write e.g. https://chat.example.org "
                    "(a wildcard is not served)."
                )

    @property
    def is_loopback(self) -> bool:
        """Say whether only this machine can reach the server."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _check_range(settings: ServeSettings, name: str, low: float, high: float) -> None:
    value = getattr(settings, name)
    # NaN fails the comparison.
    if not low <= value <= high:
        raise ConfigError(f"{name}={value!r} must be from {low:g} to {high:g}.")
