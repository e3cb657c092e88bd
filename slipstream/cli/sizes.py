"""How large is `32k`, or `40GiB`? Numbers as people write them on a command line.

Of tokens, k and m are binary as in the names of context lengths (32k = 32,768); of bytes, the unit says which
(GB = 1000^3, GiB = 1024^3).
"""

from __future__ import annotations

import re

import typer

TOKENS = re.compile(r"([0-9]+(?:\.[0-9]+)?)([km]?)", re.IGNORECASE)
TOKEN_UNITS = {"": 1, "k": 1024, "m": 1024**2}
SECONDS = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|)", re.IGNORECASE)
SECOND_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_tokens(text: str) -> int:
    """Return a number of tokens from `8192`, `32k` or `1m`. Raises typer.BadParameter."""
    match = TOKENS.fullmatch(str(text).strip())
    value = float(match[1]) * TOKEN_UNITS[match[2].lower()] if match else 0.0
    if value < 1 or value != int(value):
        raise typer.BadParameter(f"{text!r} is not a number of tokens; write e.g. 8192 or 32k (= 32768).")
    return int(value)


def parse_byte_size(text: str) -> int:
    """Return a number of bytes from `1073741824`, `512MiB` or `40GiB`. Raises typer.BadParameter."""
    from slipstream.core.errors import ConfigError
    from slipstream.engine.resolution import parse_bytes

    try:
        value = parse_bytes(str(text))
    except (ConfigError, OverflowError):
        value = 0
    if value < 1:
        raise typer.BadParameter(f"{text!r} is not a size in bytes; write e.g. 512MiB or 40GiB.")
    return value


def parse_counts(text: str) -> tuple[int, ...]:
    """Return the whole numbers of a list such as `1,4,8`. Raises typer.BadParameter."""
    parts = str(text).split(",")
    if not all(re.fullmatch(r"\s*[1-9][0-9]*\s*", part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of counts from 1; write e.g. 1,4,8.")
    return tuple(int(part) for part in parts)


def show_bytes(count: int) -> str:
    """Write a number of bytes for people, in binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def parse_seconds(text: str) -> float:
    """Return a number of seconds from `30`, `1.5s`, `500ms`, `10m` or `2h`. Raises typer.BadParameter."""
    match = SECONDS.fullmatch(str(text).strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is not a time; write e.g. 30s, 500ms or 10m.")
    return float(match[1]) * SECOND_UNITS[match[2].lower()]
