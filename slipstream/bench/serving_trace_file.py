"""What did a real service get, and when? A trace of JSON lines, replayed.

A line holds `timestamp` (milliseconds, as in the traces of Mooncake; the first line is the start), and either
`prompt` or `prompt_token_ids`, or `input_length` with an optional `hash_ids`: lines that share an id share
that block of 512 tokens of their prompts. How many tokens to generate is `output_length`, `output_tokens` or
`max_tokens`. Source of the format: Qin et al., "Mooncake" (arXiv 2407.00079), trace release.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from slipstream.bench.serving_prompts import PromptWriter
from slipstream.bench.serving_record import Prompt, ServingRequest
from slipstream.core.errors import ConfigError, nearest

PROMPT_KEYS = ("prompt", "prompt_token_ids", "input_length")
OUTPUT_KEYS = ("output_length", "output_tokens", "max_tokens")
VALID_KEYS = ("timestamp", *PROMPT_KEYS, "hash_ids", *OUTPUT_KEYS)
HASH_BLOCK_TOKENS = 512
EXPECTED = (
    '{"timestamp": ms, "prompt": "text" or "prompt_token_ids": [ids] or "input_length": n, '
    '"output_length": n} on each line'
)


@dataclasses.dataclass(frozen=True, slots=True)
class TraceLine:
    """One request of a trace. `prompt` is None where only its length is known."""

    due_s: float | None
    prompt: Prompt | None
    input_length: int
    hash_ids: tuple[int, ...]
    output_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceWorkload:
    """The lines of a trace in their order, `speed` times as fast."""

    name: str
    lines: tuple[TraceLine, ...]
    seed: int
    speed: float = 1.0

    @property
    def has_times(self) -> bool:
        return all(line.due_s is not None for line in self.lines)

    @property
    def needs_ids(self) -> bool:
        return any(isinstance(line.prompt, list) for line in self.lines)

    def requests(self, writer: PromptWriter, *, point: int) -> Iterator[ServingRequest]:
        generator = Random(f"{self.seed}/{point}")
        for line in self.lines:
            due_s = None if line.due_s is None else line.due_s / self.speed
            yield ServingRequest(self._prompt(line, writer, generator, point), line.output_tokens, due_s)

    def _prompt(self, line: TraceLine, writer: PromptWriter, generator: Random, point: int) -> Prompt:
        if line.prompt is not None:
            return line.prompt
        if not line.hash_ids:
            return writer.write(generator, line.input_length)
        prompt: Prompt | None = None
        left = line.input_length
        for hash_id in line.hash_ids:
            # A block's text follows from its id alone, so that lines which name it share it.
            block = Random(f"{self.seed}/{point}/block {hash_id}")
            size = min(HASH_BLOCK_TOKENS, left)
            prompt = writer.write(block, size) if prompt is None else writer.write(block, size, prefix=prompt)
            left -= size
            if left <= 0:
                break
        assert prompt is not None
        return prompt if left <= 0 else writer.write(generator, left, prefix=prompt)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "trace",
            "file": self.name,
            "lines": len(self.lines),
            "speed": self.speed,
            "seed": self.seed,
        }


def read_trace(path: Path, *, seed: int, speed: float, limit: int | None) -> TraceWorkload:
    """Read a trace, at most `limit` lines. Raises ConfigError naming the line at fault."""
    if not speed > 0:
        raise ConfigError(f"--trace-speed {speed:g} must be above 0; 2 replays twice as fast.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The trace {path} cannot be read: {error}.") from None
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    lines = [parse_trace_line(line, f"{path.name}:{number}") for number, line in numbered[:limit]]
    if not lines:
        raise ConfigError(f"The trace {path} holds no line; give {EXPECTED}.")
    if len({line.due_s is None for line in lines}) > 1:
        raise ConfigError(f"The trace {path} has a timestamp on some lines only; give one on all or on none.")
    lines.sort(key=lambda line: line.due_s or 0.0)
    start = lines[0].due_s or 0.0
    shifted = tuple(
        line if line.due_s is None else dataclasses.replace(line, due_s=line.due_s - start) for line in lines
    )
    return TraceWorkload(name=path.name, lines=shifted, seed=seed, speed=speed)


def parse_trace_line(line: str, place: str) -> TraceLine:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({type(error).__name__}); give {EXPECTED}.") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{place} is not a JSON object; give {EXPECTED}.")
    for key in record:
        if key not in VALID_KEYS:
            raise ConfigError(f"{place} has the key {key!r}; give {EXPECTED}.{nearest(key, VALID_KEYS)}")
    timestamp = record.get("timestamp")
    if timestamp is not None and not (_is_number(timestamp) and timestamp >= 0):
        raise ConfigError(f"{place} has the timestamp {timestamp!r}; give milliseconds of at least 0.")
    prompt, length = _prompt_of(record, place)
    output_tokens = _only_one(record, OUTPUT_KEYS, place)
    if not _is_count(output_tokens):
        raise ConfigError(f"{place} asks for {output_tokens!r} output tokens; give a whole number from 1.")
    due_s = None if timestamp is None else timestamp / 1000
    return TraceLine(due_s, prompt, length, _hash_ids_of(record, place), output_tokens)


def _prompt_of(record: dict[str, Any], place: str) -> tuple[Prompt | None, int]:
    value = _only_one(record, PROMPT_KEYS, place)
    if "input_length" in record and _is_count(value):
        return None, value
    if "prompt" in record and isinstance(value, str) and value:
        return value, 0
    is_ids = "prompt_token_ids" in record and isinstance(value, list) and value
    if is_ids and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        return value, len(value)
    raise ConfigError(f"{place} has no usable prompt; give {EXPECTED}.")


def _hash_ids_of(record: dict[str, Any], place: str) -> tuple[int, ...]:
    ids = record.get("hash_ids", [])
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(f"{place} has hash_ids that are no list of whole numbers.")
    if ids and "input_length" not in record:
        raise ConfigError(f"{place} has hash_ids and a prompt; hash_ids stand for one, so leave one out.")
    return tuple(ids)


def _only_one(record: dict[str, Any], keys: tuple[str, ...], place: str) -> Any:
    given = [key for key in keys if key in record]
    if len(given) != 1:
        raise ConfigError(f"{place} must have exactly one of {', '.join(keys)}; give {EXPECTED}.")
    return record[given[0]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
