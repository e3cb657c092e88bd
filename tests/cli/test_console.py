"""Does the line of figures follow from the output, and standard input arrive whole?"""

from __future__ import annotations

import io
import sys

import pytest

from slipstream.cli.console import describe, read_stdin, use_stdout_for_text, write_piece
from slipstream.core.errors import ConfigError
from slipstream.core.outputs import CompletionOutput, RequestMetrics, RequestOutput


def finished(count: int, *, metrics: RequestMetrics | None) -> RequestOutput:
    sample = CompletionOutput(0, token_ids=[1] * count, finish_reason="stop")
    return RequestOutput("r", None, [1] * 9, [sample], finished=True, num_cached_tokens=4, metrics=metrics)


def test_figures() -> None:
    # Two seconds for the ten tokens after the first.
    line = describe(finished(11, metrics=RequestMetrics(1.0, 1.25, 3.25)), peak_bytes=3 << 20)
    assert line == (
        "11 tokens (ended by stop), 5.0 tokens/s, first token after 0.250 s, 4 of 9 prompt tokens cached, "
        "peak memory 3 MiB"
    )


def test_one_token_has_no_rate_and_none_has_no_times() -> None:
    one = describe(finished(1, metrics=RequestMetrics(1.0, 1.5, 1.5)))
    assert one.startswith("1 token (ended") and "tokens/s" not in one and "first token after 0.500 s" in one
    none = describe(finished(0, metrics=RequestMetrics(1.0, None, 1.5)))
    assert "first token" not in none and "tokens/s" not in none


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"a", "a"), (b"a\n", "a"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), (b"", ""), ("äß\n".encode(), "äß")],
)
def test_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes, text: str) -> None:
    # The encoding of the locale must not matter.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
    assert read_stdin() == text


def test_standard_input_that_is_not_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    with pytest.raises(ConfigError, match="byte 2 is 0xff"):
        read_stdin()


def test_a_poor_encoding_shows_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    use_stdout_for_text()
    write_piece("naïve")
    assert raw.getvalue() == b"na?ve"
