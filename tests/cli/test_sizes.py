"""Are sizes read as people mean them?"""

from __future__ import annotations

import pytest
import typer

from slipstream.cli.sizes import parse_byte_size, parse_counts, parse_tokens, show_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("8192", 8192),
        ("32k", 32768),
        ("32K", 32768),
        ("1.5k", 1536),
        ("1m", 1 << 20),
        (" 2k ", 2048),
    ],
)
def test_tokens(text: str, expected: int) -> None:
    assert parse_tokens(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "k", "3z", "1.5", "1e9", "0.0001k", "3kb", "nan", "٣"])
def test_no_tokens(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1073741824", 1 << 30), ("40GiB", 40 << 30), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1k", 1000)],
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_byte_size(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-5", "inf", "GiB", "40TiBs", "4 potatoes"])
def test_no_bytes(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a size in bytes"):
        parse_byte_size(text)


def test_counts() -> None:
    assert parse_counts("1") == (1,)
    assert parse_counts("1, 4,16") == (1, 4, 16)


@pytest.mark.parametrize("text", ["", "0", "1,,2", "1,-2", "a", "1,2,"])
def test_no_counts(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a list of counts"):
        parse_counts(text)


@pytest.mark.parametrize(
    ("count", "shown"), [(12, "12 B"), (2048, "2 KiB"), (812 << 20, "812 MiB"), (3 << 29, "1.50 GiB")]
)
def test_shown_bytes(count: int, shown: str) -> None:
    assert show_bytes(count) == shown
