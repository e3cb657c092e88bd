"""Which environment variables does Slipstream read? All of them are here, at most 15.

Read at the call, never at import, so that tests and several engines in one process stay independent.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`SLIPSTREAM_CACHE`: where conversions and compiled kernels are kept (default `~/.cache/slipstream`)."""
    return Path(os.environ.get("SLIPSTREAM_CACHE") or Path.home() / ".cache" / "slipstream")


def log_level() -> str:
    """`SLIPSTREAM_LOG`: `debug`, `info`, `warning` (default) or `error`."""
    return os.environ.get("SLIPSTREAM_LOG", "warning").upper()
