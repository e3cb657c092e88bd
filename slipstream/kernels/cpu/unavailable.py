"""Why is there no compiled library for CPUs here, and what gets one? The error that callers fall back on."""

from __future__ import annotations

from slipstream.core.errors import SlipstreamError


class LibraryUnavailable(SlipstreamError):  # noqa: N818
    """The compiled kernels cannot be had; `reason` says why and `fix`, one line, what to do about it.

    Not an error in itself (hence the name): callers fall back on plain torch and announce `fix`.
    """

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"The fast CPU kernels are unavailable: {reason} {fix}")
        self.reason = reason
        self.fix = fix
