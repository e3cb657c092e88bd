"""Is a record one line that nothing in it can forge, in both forms, whoever logs?"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from slipstream.core.log_lines import LOGGERS, MAX_TEXT, JsonLines, PlainLines, escaped, write_log


@pytest.fixture(autouse=True)
def keep_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SLIPSTREAM_LOG", raising=False)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


def test_r80_text_is_cut_and_escaped() -> None:
    assert escaped("a" * (MAX_TEXT + 5)) == "a" * MAX_TEXT + f"... ({MAX_TEXT + 5} characters)"
    assert escaped("\ud800\u2028é\x1b\x85") == "\\ud800\\u2028é\\x1b\\x85"
    record = logging.LogRecord("n", logging.INFO, "", 0, "%s", ("a\nb",), None)
    assert json.loads(JsonLines().format(record))["message"] == "a\\nb"
    assert PlainLines().format(record).endswith(" INFO n a\\nb")


def test_a_line_says_whose_request_it_is_about() -> None:
    record = logging.LogRecord("n", logging.INFO, "", 0, "done", (), None)
    assert json.loads(JsonLines(request_id=lambda: "job-1").format(record))["request_id"] == "job-1"
    assert PlainLines(request_id=lambda: "job-1").format(record).endswith(" INFO n [job-1] done")
    assert "request_id" not in json.loads(JsonLines().format(record))


def test_libraries_log_in_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    write_log(as_json=True)
    for name in ("slipstream.x", "uvicorn.error", "asyncio", "opentelemetry.exporter"):
        logging.getLogger(name).warning("trouble\nat the mill")
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["trouble\\nat the mill"] * 4


def test_libraries_keep_their_details_to_themselves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPSTREAM_LOG", "debug")
    write_log(as_json=False)
    logging.getLogger("asyncio").debug("Using a selector")
    logging.getLogger("slipstream.x").debug("a detail")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" DEBUG slipstream.x a detail")
