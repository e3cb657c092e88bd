"""What can go wrong, by who has to act.

Every message states what was given, what is allowed and what to do. The classes say whose problem it is:
the person who starts an engine (`ConfigError`, `CheckpointError`, `MissingExtraError`), the author of one
request (`RequestError`), or nobody but the engine itself (`EngineError`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlipstreamError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(SlipstreamError, ValueError):
    """An argument of the engine is wrong, or two of them do not fit together."""


class UnsupportedError(ConfigError):
    """A known name whose feature this version does not serve; the message says what to use instead."""


class CheckpointError(SlipstreamError):
    """A model file is missing, malformed, hostile or does not match its configuration."""


class MissingExtraError(SlipstreamError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class OutOfMemoryError(SlipstreamError, MemoryError):
    """Memory asked for exceeds what there is; the message names both numbers and the knob."""


class EngineError(SlipstreamError, RuntimeError):
    """The engine has stopped and cannot serve further requests."""


class RequestError(SlipstreamError, ValueError):
    """One request is refused or failed; every other request goes on.

    `param` names the offending field ("" where none is), `code` is a stable machine-readable word:
    `invalid_value`, `context_length_exceeded`, `unsupported`, `template_error`, `numerical_error`,
    `processing_error`, `engine_stopped`.
    """

    def __init__(self, message: str, *, param: str = "", code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `' Did you mean 'x'?'` for the valid name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""
