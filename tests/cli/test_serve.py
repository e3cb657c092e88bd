"""Does `slipstream serve` hand every option on, from the command line, its file and the environment?"""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from slipstream.cli.config_file import read_config, read_serve_section
from slipstream.cli.serve import ServeJob, ServeOptions, curl_line, default_name, show_served
from slipstream.cli.sizes import parse_seconds
from slipstream.core.errors import ConfigError
from slipstream.serve.settings import ApiKey, ServeSettings
from tests.cli.conftest import Slipstream

# Option -> (what is typed, setting, its value).
GIVEN: dict[str, tuple[list[str], str, Any]] = {
    "host": (["--host", "0.0.0.0"], "host", "0.0.0.0"),
    "port": (["--port", "0"], "port", 0),
    "uds": (["--uds", "a.sock"], "uds", "a.sock"),
    "served_model_name": (
        ["--served-model-name", "a", "--served-model-name", "b"],
        "served_model_names",
        ("a", "b"),
    ),
    "api_key": (
        ["--api-key", "k1", "--api-key", "k2"],
        "api_keys",
        (ApiKey("key-1", "k1"), ApiKey("key-2", "k2")),
    ),
    "admin_key": (["--admin-key", "k"], "admin_keys", (ApiKey("admin-1", "k"),)),
    "api_workers": (["--api-workers", "2"], "api_workers", 2),
    "num_engines": (["--num-engines", "3"], "num_engines", 3),
    "in_process": (["--in-process"], "in_process", True),
    "on_engine_failure": (["--on-engine-failure", "restart"], "on_engine_failure", "restart"),
    "max_step_time": (["--max-step-time", "5m"], "max_step_s", 300.0),
    "max_body_bytes": (["--max-body-bytes", "2MiB"], "max_body_bytes", 2 << 20),
    "max_connections": (["--max-connections", "9"], "max_connections", 9),
    "max_queued_requests": (["--max-queued-requests", "0"], "max_queued_requests", 0),
    "max_queued_tokens": (["--max-queued-tokens", "32k"], "max_queued_tokens", 32768),
    "max_fan_out": (["--max-fan-out", "8"], "max_fan_out", 8),
    "per_key_share": (["--per-key-share", "0.25"], "per_key_share", 0.25),
    "request_timeout": (["--request-timeout", "90s"], "request_timeout_s", 90.0),
    "header_timeout": (["--header-timeout", "500ms"], "header_timeout_s", 0.5),
    "idle_timeout": (["--idle-timeout", "1m"], "idle_timeout_s", 60.0),
    "slow_reader_timeout": (["--slow_reader_timeout", "7"], "slow_reader_timeout_s", 7.0),
    "drain_timeout": (["--drain-timeout", "0"], "drain_timeout_s", 0.0),
    "cors_origin": (["--cors-origin", "https://a.example"], "cors_origins", ("https://a.example",)),
    "allowed_host": (["--allowed-host", "llm.local"], "allowed_hosts", ("llm.local",)),
    "no_ui": (["--no-ui"], "has_ui", False),
    "docs": (["--docs"], "has_docs", True),
    "log_requests": (["--log-requests"], "log_requests", True),
    "log_json": (["--log-json"], "log_json", True),
    "otlp_traces_endpoint": (
        ["--otlp-traces-endpoint", "http://x/v1"],
        "otlp_traces_endpoint",
        "http://x/v1",
    ),
}
IN_FILES = {"api_key_file", "admin_key_file", "ssl_certfile", "ssl_keyfile"}
OF_THE_ENGINE = {"max_decode_stretch"}
# Bounds that nobody turns without reading about them: in the file of --config alone.
FILE_ONLY = {"max_header_bytes", "max_headers", "max_url_bytes", "min_body_bytes_per_s"}


def settings_of(
    slipstream: Slipstream,
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
    from_file: dict[str, Any] | None = None,
) -> ServeSettings:
    jobs: list[ServeJob] = []
    monkeypatch.setattr(ServeJob, "__call__", lambda job: jobs.append(job))
    done = slipstream("serve", "m", *arguments)
    assert done.code == 0, done.err
    return jobs[0].options.to_settings(from_file or {})


def test_every_option_and_every_setting_is_in_the_table() -> None:
    names = {field.name for field in dataclasses.fields(ServeOptions)}
    assert names == GIVEN.keys() | IN_FILES | OF_THE_ENGINE
    settings = {field.name for field in dataclasses.fields(ServeSettings)}  # type: ignore[arg-type]
    assert settings == {row[1] for row in GIVEN.values()} | {"ssl_certfile", "ssl_keyfile"} | FILE_ONLY


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_reaches_its_setting(
    slipstream: Slipstream, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    typed, setting, value = GIVEN[name]
    assert getattr(ServeSettings(), setting) != value
    assert settings_of(slipstream, monkeypatch, *typed) == dataclasses.replace(
        ServeSettings(), **{setting: value}
    )


def test_the_command_line_wins_over_the_file(
    slipstream: Slipstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(
        "max-seq-len: 4k\nserve:\n  port: 9000\n  api-workers: 4\n  max_queued_tokens: 8k\n"
        "  served_model_names: [a, b]\n  max_headers: 50\n  drain_timeout_s: 5\n"
    )
    assert read_config(path) == {"max_seq_len": 4096}, "other commands pass over the server's options"
    from_file = read_serve_section(path)
    settings = settings_of(slipstream, monkeypatch, "--port", "1", from_file=from_file)
    assert (settings.port, settings.api_workers, settings.max_queued_tokens) == (1, 4, 8192)
    assert (settings.served_model_names, settings.max_headers) == (("a", "b"), 50)


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ("{prot: 1}", "Did you mean 'port'"),
        ("{port: x}", "port"),
        ("[1, 2]", "`name: value`"),
        ("{api_keys: [secret-1]}", "--api-key-file"),
        ("{cors_origins: 'https://a.example'}", "a list of texts"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_its_name(tmp_path: Path, section: str, what: str) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(f"serve: {section}\n")
    with pytest.raises(ConfigError, match=r"all\.yaml") as refused:
        read_serve_section(path)
    assert what in str(refused.value) and "secret-1" not in str(refused.value)


def test_an_empty_section_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    for text in ("", "serve:\n", "max_seq_len: 5\n"):
        path.write_text(text)
        assert read_serve_section(path) == {}


def test_keys_come_from_a_file_with_their_names(
    slipstream: Slipstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("# users\nalice key-a\nkey-b\n")
    settings = settings_of(slipstream, monkeypatch, "--api-key-file", str(path), "--admin-key", "key-c")
    assert settings.api_keys == (ApiKey("alice", "key-a"), ApiKey("key-2", "key-b"))
    both = settings_of(slipstream, monkeypatch, "--api-key-file", str(path), "--api-key", "key-d")
    assert [key.name for key in both.api_keys] == ["key-1", "alice", "key-file-2"]
    with pytest.raises(ConfigError, match="No such file"):
        settings_of(slipstream, monkeypatch, "--api-key-file", str(tmp_path / "none"))


def test_the_environment_brings_a_key_where_no_option_does(
    slipstream: Slipstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "key-of-env")
    assert settings_of(slipstream, monkeypatch).api_keys == (ApiKey("key-1", "key-of-env"),)
    given = settings_of(slipstream, monkeypatch, "--api-key", "key-typed")
    assert given.api_keys == (ApiKey("key-1", "key-typed"),)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30.0), ("1.5s", 1.5), ("500ms", 0.5), ("10m", 600.0), ("2H", 7200.0), ("0", 0.0)],
)
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "1d", "1 000", "nan", "inf"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="30s"):
        parse_seconds(text)


def test_a_model_without_a_name_is_called_by_the_end_of_its_path(tmp_path: Path) -> None:
    (tmp_path / "llama-8b").mkdir()
    (tmp_path / "small.gguf").touch()
    assert default_name(str(tmp_path / "llama-8b")) == "llama-8b"
    assert default_name(str(tmp_path / "small.gguf")) == "small"
    assert default_name("org/model") == "org/model"


@pytest.mark.parametrize("settings", [{}, {"api_keys": (ApiKey("a", "secret"),)}, {"uds": "/run/a.sock"}])
def test_the_curl_line_is_whole(settings: dict[str, Any]) -> None:
    known = ServeSettings(served_model_names=("it's",), **settings)
    words = shlex.split(curl_line("http://127.0.0.1:8000", known))
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "it's" and body["messages"][0]["role"] == "user"
    assert ("Authorization: Bearer $SLIPSTREAM_API_KEY" in words) is bool(known.api_keys)
    assert "secret" not in " ".join(words)


def test_an_open_server_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    class Info:
        report = ("device cpu",)

    def said(**settings: Any) -> str:
        show_served("http://x:1", ServeSettings(served_model_names=("m",), **settings), Info())  # type: ignore[arg-type]
        return capsys.readouterr().err

    assert "warning: whoever reaches 0.0.0.0" in said(host="0.0.0.0")
    assert "warning" not in said() and "device cpu" in said()
    assert "warning" not in said(host="0.0.0.0", api_keys=(ApiKey("a", "secret"),))
    assert "a page to try it" in said() and "a page to try it" not in said(has_ui=False)


def test_a_missing_extra_is_named(slipstream: Slipstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "slipstream.serve.running", None)
    monkeypatch.setattr("slipstream.cli.serve.EXTRA_PACKAGES", ("slipstream",))
    done = slipstream("serve", "m")
    assert done.code == 1 and "pip install 'slipstream-llm[serve]'" in done.err
