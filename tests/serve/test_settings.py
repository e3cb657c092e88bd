"""Is every option of a server checked by name and range, and does none of its secrets show?"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from slipstream.core.errors import ConfigError
from slipstream.serve.settings import ApiKey, ServeSettings

ALICE = ApiKey("alice", "secret-of-alice")


@pytest.mark.parametrize(
    "given",
    [
        {"port": 65536},
        {"port": "8000"},
        {"api_workers": 0},
        {"max_body_bytes": 10},
        {"max_url_bytes": 1 << 20},
        {"per_key_share": 0.0},
        {"per_key_share": float("nan")},
        {"header_timeout_s": 0.0},
        {"idle_timeout_s": 0.5},
        {"request_timeout_s": 0.0},
        {"on_engine_failure": "ignore"},
        {"ssl_certfile": "cert.pem"},
        {"uds": "sock", "ssl_certfile": "a", "ssl_keyfile": "b"},
        {"in_process": True, "api_workers": 2},
        {"in_process": True, "on_engine_failure": "restart"},
        {"cors_origins": ("*",)},
        {"cors_origins": ("https://a.example/path",)},
        {"allowed_hosts": ("*.example",)},
        {"allowed_hosts": ("a.example:80",)},
        {"served_model_names": ("two words",)},
        {"api_keys": (ALICE, ApiKey("alice", "other"))},
        {"api_keys": (ALICE, ApiKey("bob", "secret-of-alice"))},
        {"api_keys": (ALICE,), "admin_keys": (ApiKey("root", "secret-of-alice"),)},
        {"nonsense": 1},
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        ServeSettings(**given)
    assert any(name in str(refused.value) for name in given) or "key" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_secret_never_shows() -> None:
    settings = ServeSettings(api_keys=(ALICE,))
    assert "secret-of-alice" not in repr(settings) and "alice" in repr(settings)


@pytest.mark.parametrize("secret", ["", "two words", "tab\t", "ünicode", "x" * 513])
def test_a_key_that_no_header_carries_is_refused(secret: str) -> None:
    with pytest.raises(ConfigError, match="'alice'"):
        ApiKey("alice", secret)


def test_settings_cross_to_another_process_as_they_are() -> None:
    settings = ServeSettings(api_keys=(ALICE,), served_model_names=("a", "b"), request_timeout_s=5.0)
    assert msgspec.json.decode(msgspec.json.encode(settings), type=ServeSettings) == settings


def test_r28_the_defaults_are_for_this_machine_alone() -> None:
    settings = ServeSettings()
    assert settings.is_loopback and settings.host == "127.0.0.1" and settings.port == 8000
    assert settings.cors_origins == () and not settings.has_docs and not settings.log_requests


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)],
)
def test_it_knows_whether_others_can_reach_it(host: str, is_loopback: bool) -> None:
    assert dataclasses.replace(ServeSettings(), host=host).is_loopback is is_loopback
