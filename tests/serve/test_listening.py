"""Is the socket where it was asked for, refused in a sentence where it cannot be, and nobody else's?"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from slipstream.core.errors import ConfigError
from slipstream.serve.listening import address_of, listen, raise_file_limit
from slipstream.serve.settings import ServeSettings


def test_a_free_port_is_found_and_told() -> None:
    settings = ServeSettings(port=0)
    with listen(settings) as bound:
        host, port = bound.getsockname()
        assert host == "127.0.0.1" and port > 0
        assert address_of(bound, settings) == f"http://127.0.0.1:{port}"
        with socket.create_connection((host, port), timeout=10):
            pass


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_names_and_ipv6_addresses_work_too(host: str) -> None:
    try:
        bound = listen(ServeSettings(port=0, host=host))
    except ConfigError:
        pytest.skip(f"this machine has no {host}")
    with bound:
        assert address_of(bound, ServeSettings(host=host)).startswith(("http://[::1]:", "http://127.0.0.1:"))


def test_r79_a_port_in_use_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} of 127.0.0.1 is in use"):
            listen(ServeSettings(port=port))


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7"])
def test_r79_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="is no address of this machine"):
        listen(ServeSettings(port=0, host=host))


def test_a_unix_socket_replaces_only_what_a_server_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    settings = ServeSettings(uds=str(path))
    listen(settings).close()
    assert path.exists(), "left behind"
    with listen(settings) as bound:
        assert path.stat().st_mode & 0o777 == 0o600
        assert address_of(bound, settings) == f"unix:{path}"
        with pytest.raises(ConfigError, match="another server listens there"):
            listen(settings)
    path.unlink()
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is no socket"):
        listen(settings)
    assert path.read_text() == "mine"


def test_the_file_limit_only_ever_grows() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        raise_file_limit(1000)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft >= min(1000, before[1]) and hard == before[1]
        raise_file_limit(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_r79_a_certificate_that_cannot_be_used_is_refused_before_anything_starts(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.pem")
    with pytest.raises(ConfigError, match="No such file"):
        listen(ServeSettings(port=0, ssl_certfile=missing, ssl_keyfile=missing))
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    with pytest.raises(ConfigError, match="cannot be used"):
        listen(ServeSettings(port=0, ssl_certfile=str(broken), ssl_keyfile=str(broken)))
