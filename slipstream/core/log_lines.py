"""How is a log line of a server's process written, so that nothing a client sends can forge or garble one?

Invariant: one record is one line, or one line and indented ones, and holds no control character; as JSON it
is one line.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from typing import Any

from slipstream.core import env

# C0 and C1 controls, line and paragraph separators, and what reverses or hides text.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
MAX_TEXT = 4096
OURS = ("slipstream", "uvicorn", "uvicorn.error")
LOGGERS = (*OURS, "asyncio", "opentelemetry")

RequestId = Callable[[], str]


def escaped(text: str) -> str:
    """Return text that stays on one line, at most `MAX_TEXT` characters of it."""
    cut = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters)"
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), cut)


def _no_request() -> str:
    return ""


def _when(created: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created)) + f".{int(created % 1 * 1000):03d}Z"


class PlainLines(logging.Formatter):
    """`time level logger [request id] message`; a traceback, at the debug level alone, is indented."""

    def __init__(self, *, request_id: RequestId = _no_request) -> None:
        super().__init__()
        self._request_id = request_id

    def format(self, record: logging.LogRecord) -> str:
        request_id = self._request_id()
        about = f" [{request_id}]" if request_id else ""
        message = escaped(record.getMessage())
        line = f"{_when(record.created)} {record.levelname} {record.name}{about} {message}"
        return line + self._exception(record)

    def _exception(self, record: logging.LogRecord) -> str:
        if not record.exc_info or record.exc_info[0] is None:
            return ""
        if env.log_level() != "DEBUG":
            return f": {record.exc_info[0].__name__}: {escaped(str(record.exc_info[1]))}"
        lines = self.formatException(record.exc_info).splitlines()
        return "".join(f"\n  | {escaped(line)}" for line in lines)


class JsonLines(logging.Formatter):
    """One JSON object a line; what a record brings as `extra={"facts": {...}}` is at its top level."""

    def __init__(self, *, request_id: RequestId = _no_request) -> None:
        super().__init__()
        self._request_id = request_id

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _when(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": escaped(record.getMessage()),
        }
        request_id = self._request_id()
        if request_id:
            entry["request_id"] = request_id
        if record.exc_info and record.exc_info[0] is not None:
            entry["error"] = escaped(f"{record.exc_info[0].__name__}: {record.exc_info[1]}")
            if env.log_level() == "DEBUG":
                entry["traceback"] = self.formatException(record.exc_info)
        entry |= getattr(record, "facts", {})
        return json.dumps(entry, ensure_ascii=True, default=str)


def write_log(*, as_json: bool, request_id: RequestId = _no_request) -> None:
    """Write the log of this process and of the libraries that serve it to standard error in this form."""
    form = JsonLines if as_json else PlainLines
    handler = logging.StreamHandler()
    handler.setFormatter(form(request_id=request_id))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        # What libraries say below a warning is for their own authors.
        logger.setLevel(env.log_level() if name in OURS else max(logging.WARNING, logger.level))
