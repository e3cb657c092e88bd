"""Does `slipstream trace` write what was asked for, and say what it wrote?"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream.cli.main import run_command
from slipstream.cli.trace import trace
from slipstream.trace.reading import encode_trace, read_trace
from tests.cli.conftest import Slipstream
from tests.trace.samples import by_hand


@pytest.fixture(autouse=True)
def keep_logging() -> Iterator[None]:
    logger = logging.getLogger("slipstream")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "kept.json"
    path.write_bytes(encode_trace(by_hand(), model="m"))
    return path


def test_a_page_by_default(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["trace", str(kept)]) == 0
    assert (tmp_path / "trace.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    said = capsys.readouterr()
    assert said.out == "" and "3 requests and 5 steps in 0.10 s, written to trace.html" in said.err


def test_only_what_is_asked_for(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["trace", str(kept), "--perfetto", "p.json", "--save", "again.json"]) == 0
    assert json.loads((tmp_path / "p.json").read_bytes())["traceEvents"]
    assert read_trace(str(tmp_path / "again.json")).trace == by_hand()
    assert not (tmp_path / "trace.html").exists()
    assert run_command(["trace", str(kept), "-o", "page.html", "--perfetto", "p.json"]) == 0
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize("option", ["--output", "--perfetto", "--save"])
def test_what_cannot_be_written_is_said(
    kept: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["trace", str(kept), option, str(tmp_path / "none" / "x")]) == 1
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err


def test_what_is_no_trace_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["trace", str(tmp_path / "none.json")]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert run_command(["trace"]) == 2
    assert "URL_OR_FILE" in capsys.readouterr().err


def test_the_key_comes_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "from-environment")
    assert trace("http://x").api_key == "from-environment"
    assert trace("http://x", api_key="given").api_key == "given"


def test_a_bench_draws_what_its_engine_did(slipstream: Slipstream, tiny_path: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.html"
    small = ("--isl", 6, "--osl", 4, "--num-requests", 3, "--runs", 2)
    finished = slipstream("bench", "throughput", tiny_path, *small, "--trace", path)
    assert finished.code == 0, finished.err
    page = path.read_text(encoding="utf-8")
    data = json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])
    # Two runs of three requests, and what warms up before them.
    whole = [lane for lane in data["lanes"] if lane["num_output_tokens"] == 4]
    assert len(whole) >= 6 and all(lane["outcome"] == "length" for lane in whole)
    assert data["model"] == Path(tiny_path).name and tiny_path not in page
    finished = slipstream("bench", "throughput", tiny_path, *small, "--trace", tmp_path / "no" / "x.html")
    assert finished.code == 1 and "x.html" in finished.err
