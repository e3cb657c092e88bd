"""What text has so many tokens, on a server whose tokenizer nobody here has?

Words that nearly every vocabulary holds as one token each, and how many tokens the server counts for them:
two requests of known size say it (`calibrated`). Where the server takes token ids, ids are exact. The record
holds the counts of the server either way, never what was meant.
"""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Protocol

from slipstream.bench.measure import BenchError
from slipstream.bench.serving_record import Prompt
from slipstream.core.errors import ConfigError

COMMON_WORDS = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law car city community name president team minute idea
body information back parent face others level office door health person art war history party result change
morning reason research girl guy moment air teacher force education
"""
WORDS = COMMON_WORDS.split()
# Below these lie the special ids of most vocabularies.
FIRST_ORDINARY_ID = 256
CALIBRATION_WORDS = (16, 272)


class PromptWriter(Protocol):
    """`write` draws a prompt of about `num_tokens` tokens after those of `prefix`."""

    def write(self, generator: Random, num_tokens: int, *, prefix: Prompt = "") -> Prompt: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordWriter:
    """Prompts of common words. `base_tokens` are those the server adds to each request (a chat template)."""

    tokens_per_word: float = 1.0
    base_tokens: float = 0.0

    def write(self, generator: Random, num_tokens: int, *, prefix: Prompt = "") -> Prompt:
        assert isinstance(prefix, str)
        base = 0.0 if prefix else self.base_tokens
        count = max(1, round((num_tokens - base) / self.tokens_per_word))
        text = " ".join(generator.choices(WORDS, k=count))
        return f"{prefix} {text}" if prefix else text

    @classmethod
    def calibrated(cls, counts: tuple[int, int]) -> WordWriter:
        """Return the writer for a server that counted so many tokens for prompts of CALIBRATION_WORDS."""
        few, many = CALIBRATION_WORDS
        per_word = (counts[1] - counts[0]) / (many - few)
        if per_word <= 0:
            raise BenchError(
                f"The server counts {counts[0]} tokens for {few} words and {counts[1]} for {many}, so no "
                "prompt of a given length can be written; give --prompt-ids, or a --trace with prompts."
            )
        return cls(tokens_per_word=per_word, base_tokens=max(0.0, counts[0] - per_word * few))


@dataclasses.dataclass(frozen=True)
class IdWriter:
    """Prompts of random token ids below `vocab_size`: exactly as long as asked for, in any vocabulary."""

    vocab_size: int

    def __post_init__(self) -> None:
        if self.vocab_size <= FIRST_ORDINARY_ID:
            raise ConfigError(
                f"--prompt-ids {self.vocab_size} leaves no id to draw: ids below {FIRST_ORDINARY_ID} are "
                "special in many vocabularies; give the size of the model's vocabulary."
            )

    def write(self, generator: Random, num_tokens: int, *, prefix: Prompt = "") -> Prompt:
        ids = generator.choices(range(FIRST_ORDINARY_ID, self.vocab_size), k=num_tokens)
        return [*prefix, *ids] if isinstance(prefix, list) else ids
