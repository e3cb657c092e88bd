"""Is a trace read from a server or a file, and what is none refused with what to do?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from slipstream.core.errors import ConfigError
from slipstream.trace import reading
from slipstream.trace.reading import decode_trace, encode_trace, read_trace
from tests.trace.samples import by_hand

ANSWER = encode_trace(by_hand(), model="m")
KEY = "sk-key"


class Site(BaseHTTPRequestHandler):
    """Serves a trace to who has the key; /moved points elsewhere."""

    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization", "")))
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/trace.json")
        elif self.path != "/trace.json":
            self.send_response(404)
        else:
            self.send_response(200 if self.headers.get("Authorization") == f"Bearer {KEY}" else 401)
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def site() -> Iterator[str]:
    Site.seen = []
    server = HTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(ANSWER)
    found = read_trace(str(path))
    assert (found.model, found.trace) == ("m", by_hand())


@pytest.mark.parametrize("ending", ["", "/", "/trace.json"])
def test_a_server_is_asked_with_its_key(site: str, ending: str) -> None:
    assert read_trace(site + ending, api_key=KEY).trace == by_hand()
    assert Site.seen == [("/trace.json", f"Bearer {KEY}")]


def test_a_server_that_refuses_or_points_elsewhere(site: str) -> None:
    with pytest.raises(ConfigError, match=r"answered 401 .*; give --api-key"):
        read_trace(site)
    with pytest.raises(ConfigError, match=r"answered 404 .*is it a slipstream server"):
        read_trace(site + "/v1", api_key=KEY)
    Site.seen.clear()
    with pytest.raises(ConfigError, match="answered 302"):
        read_trace(site + "/moved", api_key=KEY)
    assert len(Site.seen) == 1, "the key is not carried on"


def test_nobody_listens() -> None:
    # A port that was free a moment ago.
    server = HTTPServer(("127.0.0.1", 0), Site)
    server.server_close()
    with pytest.raises(ConfigError, match="cannot be reached"):
        read_trace(f"http://127.0.0.1:{server.server_port}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        read_trace(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"traceEvents": []}',
        ANSWER[:-40],
        ANSWER.replace(b'"step_id":5', b'"step_id":"5"', 1),
        b"[" * 100_000,
    ],
)
def test_what_is_no_trace_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigError, match="holds no trace of slipstream"):
        decode_trace(content, source="x.json")


def test_another_version_is_refused() -> None:
    later = ANSWER.replace(b'"version":1', b'"version":2')
    with pytest.raises(ConfigError, match="version 2, and this is version 1"):
        decode_trace(later, source="x.json")


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", len(ANSWER) - 1)
    path = tmp_path / "trace.json"
    path.write_bytes(ANSWER)
    with pytest.raises(ConfigError, match="larger than a trace can be"):
        read_trace(str(path))
