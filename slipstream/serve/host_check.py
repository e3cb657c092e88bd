"""By which names may the server be called? A guard against pages that rebind their own name to this machine.

A page of any site can point its DNS name at 127.0.0.1 after it was loaded; to the browser the server is then
that site's own, and no rule about origins holds (CVE-2024-28224 is of that kind). Such a request carries the
site's name as its host. So a server that only this machine reaches and that asks for no key answers to
addresses, to localhost and to `allowed_hosts`, and to nothing else. With keys, or where it is meant for other
machines under whatever name, there is nothing to guard.
"""

from __future__ import annotations

import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from slipstream.serve.errors import ApiError
from slipstream.serve.settings import ServeSettings

LOCAL_NAMES = ("localhost",)


class HostCheck:
    """ASGI middleware that refuses requests which name another host."""

    def __init__(self, app: ASGIApp, *, settings: ServeSettings) -> None:
        self._app = app
        self._is_guarded = settings.is_loopback and settings.uds is None and not settings.api_keys
        self._names = frozenset(name.lower() for name in (*LOCAL_NAMES, *settings.allowed_hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._is_guarded or self._is_own(scope):
            return await self._app(scope, receive, send)
        message = (
            "This server answers to its address and to localhost; start it with --allowed-host for a name."
        )
        await ApiError(403, message, code="host_not_allowed").response()(scope, receive, send)

    def _is_own(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"host"]
        # No browser leaves it out or sends two.
        if len(given) != 1:
            return not given
        name = host_name(given[0].decode("latin-1"))
        return name.lower().removesuffix(".") in self._names or is_address(name)


def host_name(host: str) -> str:
    """Return a host header's name or address, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
