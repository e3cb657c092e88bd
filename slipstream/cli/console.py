"""What goes to which stream? Answers to standard output, everything about them to standard error.

Invariant: with standard error thrown away, standard output holds the answer and nothing else.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from slipstream.cli.sizes import show_bytes
from slipstream.core.errors import ConfigError

if TYPE_CHECKING:
    from slipstream.core.outputs import RequestOutput
    from slipstream.llm import LLM


def use_stdout_for_text() -> None:
    """Let a character that the terminal's encoding lacks show as a mark instead of failing the answer."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def write_piece(text: str) -> None:
    """Write a part of an answer, at once. Raises BrokenPipeError where nobody reads."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_stdin() -> str:
    """Return standard input, less one line end at its end. Raises ConfigError where it is not UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Standard input is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "convert it first."
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def show_start(llm: LLM) -> None:
    """Say what was chosen at start; at log level info the engine has said so already."""
    if not logging.getLogger("slipstream").isEnabledFor(logging.INFO):
        for line in llm.startup.report:
            note(line)


def describe(output: RequestOutput, *, peak_bytes: int | None = None) -> str:
    """Return one line of figures on a finished answer."""
    sample, metrics = output.outputs[0], output.metrics
    count = len(sample.token_ids)
    parts = [f"{count} token{'s' if count != 1 else ''} (ended by {sample.finish_reason})"]
    if metrics is not None and metrics.first_token_s is not None and metrics.finished_s is not None:
        decode_s = metrics.finished_s - metrics.first_token_s
        if count > 1 and decode_s > 0:
            parts.append(f"{(count - 1) / decode_s:.1f} tokens/s")
        parts.append(f"first token after {metrics.first_token_s - metrics.arrival_s:.3f} s")
    num_prompt = len(output.prompt_token_ids)
    parts.append(f"{output.num_cached_tokens} of {num_prompt} prompt tokens cached")
    if peak_bytes is not None:
        parts.append(f"peak memory {show_bytes(peak_bytes)}")
    return ", ".join(parts)
