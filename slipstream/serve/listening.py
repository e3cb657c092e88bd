"""Where does the server listen? One socket, bound before anything else is started.

Invariant: what keeps it from listening is one sentence before a model is loaded, and the socket of a server
that runs is never taken from it: a port that is in use is refused, and so is a unix socket that somebody
answers at.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import stat

from slipstream.core.errors import ConfigError
from slipstream.serve.settings import ServeSettings

BACKLOG = 2048
# Descriptors of a server beside its connections: sockets to the engine, logs, libraries.
SPARE_FILES = 256
UDS_MODE = 0o600


def listen(settings: ServeSettings) -> socket.socket:
    """Bind and listen. Raises ConfigError, also for a certificate that cannot be used."""
    if settings.ssl_certfile is not None:
        _check_certificate(settings.ssl_certfile, settings.ssl_keyfile)
    bound = _bind_unix(settings.uds) if settings.uds is not None else _bind_inet(settings)
    bound.listen(BACKLOG)
    bound.setblocking(False)
    return bound


def _check_certificate(certificate: str, key: str | None) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"ssl_certfile={certificate!r} with ssl_keyfile={key!r} cannot be used: {why}; give a "
            "certificate and its key without a password, in PEM."
        ) from None


def _bind_inet(settings: ServeSettings) -> socket.socket:
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"host={host!r} is no address of this machine; use 127.0.0.1 or 0.0.0.0.") from None
    # A name such as localhost may have several; IPv4 is what clients try.
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            # Lets a server start again at once; it does not let two listen at one port.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(_why_not(error, host, port)) from None
    return bound


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {host} is in use; choose another with --port, or 0 for any free one."
    if error.errno == errno.EACCES:
        return f"Port {port} needs rights that this user lacks; choose one from 1024 with --port."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"host={host!r} is no address of this machine; use 127.0.0.1 or 0.0.0.0."
    return f"Cannot listen at port {port} of {host}: {os.strerror(error.errno or 0)}."


def _bind_unix(path: str) -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError("This system has no unix sockets; leave out uds, and give host and port.")
    with contextlib.suppress(FileNotFoundError):
        _remove_stale(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Nobody may connect between the bind and a chmod.
    before = os.umask(0o777 & ~UDS_MODE)
    try:
        bound.bind(path)
    except OSError as error:
        bound.close()
        raise ConfigError(f"uds={path!r}: {error.strerror or error}.") from None
    finally:
        os.umask(before)
    return bound


def _remove_stale(path: str) -> None:
    """Remove what a server that is gone left behind. Raises ConfigError where it is something else."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise ConfigError(f"uds={path!r} exists and is no socket; choose another path.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise ConfigError(f"uds={path!r}: {error.strerror or error}.") from None
    raise ConfigError(f"uds={path!r}: another server listens there; choose another path.")


def address_of(bound: socket.socket, settings: ServeSettings) -> str:
    """Return the address as a client types it."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.ssl_certfile else 'http'}://{shown}:{port}"


def raise_file_limit(max_connections: int) -> None:
    """Let this process open as many files as its connections need, as far as the system allows."""
    try:
        import resource
    except ImportError:
        return  # Windows has no such limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
