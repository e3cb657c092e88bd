"""How is a log line of the server written, so that nothing a client sends can forge or garble one?

Invariant: one record is one line, or one line and indented ones, and holds no control character; as JSON it
is one line. Prompts, keys, headers and query strings are never logged here.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

from slipstream.core import env
from slipstream.serve.request_facts import current_facts

# C0 and C1 controls, line and paragraph separators, and what reverses or hides text.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
MAX_TEXT = 4096
OURS = ("slipstream", "uvicorn", "uvicorn.error")
LOGGERS = (*OURS, "asyncio", "opentelemetry")


def escaped(text: str) -> str:
    """Return text that stays on one line, at most `MAX_TEXT` characters of it."""
    cut = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters)"
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), cut)


def _request_id() -> str:
    facts = current_facts()
    return "" if facts is None else facts.request_id


def _when(created: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created)) + f".{int(created % 1 * 1000):03d}Z"


class PlainFormatter(logging.Formatter):
    """`time level logger [request id] message`; a traceback, at the debug level alone, is indented."""

    def format(self, record: logging.LogRecord) -> str:
        request_id = _request_id()
        about = f" [{request_id}]" if request_id else ""
        line = (
            f"{_when(record.created)} {record.levelname} {record.name}{about} {escaped(record.getMessage())}"
        )
        if record.exc_info and record.exc_info[0] is not None:
            line += _exception(record)
        return line


def _exception(record: logging.LogRecord) -> str:
    assert record.exc_info is not None
    if env.log_level() != "DEBUG":
        kind, error, _ = record.exc_info
        return f": {kind.__name__ if kind else ''}: {escaped(str(error))}"
    lines = logging.Formatter().formatException(record.exc_info).splitlines()
    return "".join(f"\n  | {escaped(line)}" for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a record brings as `extra={"facts": {...}}` is at its top level."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _when(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": escaped(record.getMessage()),
        }
        request_id = _request_id()
        if request_id:
            entry["request_id"] = request_id
        if record.exc_info and record.exc_info[0] is not None:
            entry["error"] = escaped(f"{record.exc_info[0].__name__}: {record.exc_info[1]}")
            if env.log_level() == "DEBUG":
                entry["traceback"] = logging.Formatter().formatException(record.exc_info)
        entry |= getattr(record, "facts", {})
        return json.dumps(entry, ensure_ascii=True, default=str)


def configure_server_log(*, as_json: bool) -> None:
    """Write the log of this process and of the libraries that serve it to standard error in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        # What libraries say below a warning is for their own authors.
        logger.setLevel(env.log_level() if name in OURS else max(logging.WARNING, logger.level))
