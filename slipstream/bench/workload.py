"""What is an engine asked to do in a measurement? Prompts and output lengths, drawn or read from a file.

Invariant: a workload is a function of its specification and seed, and states exactly how many tokens an
engine must run for it: the prompt and every output token but the last, which is sampled and never run.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from slipstream.core.errors import ConfigError, nearest
from slipstream.text.base import Tokenizer

PROMPT_KEYS = ("prompt", "prompt_token_ids")
OUTPUT_KEYS = ("output_tokens", "max_tokens")
# Most text needs fewer tokens; only an estimate for the size of a KV cache hangs on it.
BYTES_PER_TOKEN = 3


@dataclasses.dataclass(frozen=True, slots=True)
class BenchRequest:
    """One prompt as ids, and how many tokens to generate after it."""

    prompt_token_ids: Sequence[int]
    output_tokens: int

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.output_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class DatasetLine:
    """One line of a dataset: text or ids, and how many tokens to generate."""

    prompt: str | tuple[int, ...]
    output_tokens: int

    @property
    def estimated_tokens(self) -> int:
        is_text = isinstance(self.prompt, str)
        size = len(self.prompt.encode()) // BYTES_PER_TOKEN + 1 if is_text else len(self.prompt)  # type: ignore[union-attr]
        return size + self.output_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomWorkload:
    """`num_requests` prompts of uniformly random ids; lengths are uniform in [min, max], both included."""

    num_requests: int
    isl: tuple[int, int]
    osl: tuple[int, int]
    seed: int

    def __post_init__(self) -> None:
        for name, value in (("isl", self.isl), ("osl", self.osl)):
            if not 1 <= value[0] <= value[1]:
                raise ConfigError(
                    f"{name} from {value[0]} to {value[1]} is no range of lengths; the lower end must be at "
                    "least 1 and at most the upper."
                )
        if self.num_requests < 1:
            raise ConfigError(f"num_requests={self.num_requests} must be at least 1.")

    def largest_sizes(self) -> list[int]:
        """Return a bound on the tokens of each request."""
        return [self.isl[1] + self.osl[1]] * self.num_requests

    def draw(
        self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> list[BenchRequest]:
        """Draw the requests; no special id and no id that ends a text is ever in a prompt."""
        generator = random.Random(self.seed)
        ids = ordinary_ids(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        requests: list[BenchRequest] = []
        for _ in range(self.num_requests):
            length, output_tokens = generator.randint(*self.isl), generator.randint(*self.osl)
            requests.append(BenchRequest(generator.choices(ids, k=length), output_tokens))
        return requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetWorkload:
    """The lines of a file, in their order."""

    lines: tuple[DatasetLine, ...]

    def largest_sizes(self) -> list[int]:
        """Return an estimate of the tokens of each request."""
        return [line.estimated_tokens for line in self.lines]

    def draw(
        self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> list[BenchRequest]:
        """Turn each line into ids; whether they are below `vocab_size` is checked with the request."""
        return [
            BenchRequest(
                tokenizer.encode(line.prompt) if isinstance(line.prompt, str) else line.prompt,
                line.output_tokens,
            )
            for line in self.lines
        ]


Workload = RandomWorkload | DatasetWorkload


def ordinary_ids(tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> list[int]:
    """Return the ids that a random prompt may hold."""
    excluded = {*tokenizer.special_ids, *tokenizer.eos_token_ids, *eos_token_ids}
    ids = [i for i in range(min(vocab_size, tokenizer.vocab_size)) if i not in excluded]
    if not ids:
        raise ConfigError(
            f"All {vocab_size} ids of the model are special, so no prompt can be drawn; give a dataset."
        )
    return ids


def read_dataset(path: Path, *, limit: int | None = None) -> DatasetWorkload:
    """Read a JSON-lines file, at most `limit` requests of it. Raises ConfigError naming the line at fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The dataset {path} cannot be read: {error}.") from None
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    lines = tuple(parse_line(line, f"{path.name}:{number}") for number, line in numbered[:limit])
    if not lines:
        raise ConfigError(f"The dataset {path} holds no line; give {EXPECTED}.")
    return DatasetWorkload(lines=lines)


EXPECTED = '{"prompt": "text" or "prompt_token_ids": [ids], "output_tokens" or "max_tokens": n} on each line'


def parse_line(line: str, place: str) -> DatasetLine:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({type(error).__name__}); give {EXPECTED}.") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{place} is not a JSON object; give {EXPECTED}.")
    valid = (*PROMPT_KEYS, *OUTPUT_KEYS)
    for key in record:
        if key not in valid:
            raise ConfigError(f"{place} has the key {key!r}; give {EXPECTED}.{nearest(key, valid)}")
    prompt = _only_one(record, PROMPT_KEYS, place)
    output_tokens = _only_one(record, OUTPUT_KEYS, place)
    if not _is_count(output_tokens) or output_tokens < 1:
        raise ConfigError(f"{place} asks for {output_tokens!r} output tokens; give a whole number from 1.")
    if isinstance(prompt, list) and prompt and all(_is_count(i) for i in prompt):
        return DatasetLine(tuple(prompt), output_tokens)
    if isinstance(prompt, str) and prompt and "prompt" in record:
        return DatasetLine(prompt, output_tokens)
    raise ConfigError(f"{place} has no usable prompt; give {EXPECTED}.")


def _only_one(record: dict[str, Any], keys: Sequence[str], place: str) -> Any:
    given = [key for key in keys if key in record]
    if len(given) != 1:
        raise ConfigError(f"{place} must have exactly one of {' and '.join(keys)}; give {EXPECTED}.")
    return record[given[0]]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def expected_tokens(requests: Iterable[BenchRequest]) -> int:
    """Return how many tokens an engine runs for these requests when it reuses nothing."""
    return sum(request.num_tokens - 1 for request in requests)


def pool_tokens(sizes: Sequence[int], *, max_running: int, block_tokens: int = 32) -> int:
    """Return the KV cache, in tokens, that lets the `max_running` largest requests run without preemption."""
    blocks = [-(-size // block_tokens) + 1 for size in sizes]
    return sum(sorted(blocks, reverse=True)[:max_running]) * block_tokens
