"""Which requests does a server get? An endless, seeded stream of them, or the lines of a trace.

Invariant: what is drawn depends on the specification, the seed and the number of the load point, and on
nothing the server does. Load points share no drawn prompt, so that none finds the cache of an earlier one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from random import Random
from typing import Any, Protocol

from slipstream.bench.serving_lengths import Lengths
from slipstream.bench.serving_prompts import PromptWriter
from slipstream.bench.serving_record import Prompt, ServingRequest
from slipstream.core.errors import ConfigError


class ServingWorkload(Protocol):
    """`requests` may be endless; `describe` is what the record says of it."""

    def requests(self, writer: PromptWriter, *, point: int) -> Iterator[ServingRequest]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnWorkload:
    """Random prompts; with `shared_prefix` each begins with one of `num_prefixes` texts of so many tokens."""

    prompt: Lengths
    output: Lengths
    seed: int
    shared_prefix: int = 0
    num_prefixes: int = 1

    def __post_init__(self) -> None:
        if self.shared_prefix < 0 or self.num_prefixes < 1:
            raise ConfigError(
                f"--shared-prefix {self.shared_prefix} with --num-prefixes {self.num_prefixes}: give a "
                "number of tokens, and at least one prefix."
            )

    def requests(self, writer: PromptWriter, *, point: int) -> Iterator[ServingRequest]:
        generator = Random(f"{self.seed}/{point}")
        prefixes = self._prefixes(writer, generator)
        for number in itertools.count():
            length = self.prompt.draw(generator)
            # In turn, not at random: every prefix is asked for equally often from the start.
            prompt = (
                writer.write(generator, length, prefix=prefixes[number % len(prefixes)])
                if prefixes
                else writer.write(generator, length)
            )
            yield ServingRequest(prompt, self.output.draw(generator))

    def _prefixes(self, writer: PromptWriter, generator: Random) -> list[Prompt]:
        if not self.shared_prefix:
            return []
        return [writer.write(generator, self.shared_prefix) for _ in range(self.num_prefixes)]

    def describe(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "kind": "drawn",
            "prompt_tokens": self.prompt.describe(),
            "output_tokens": self.output.describe(),
            "seed": self.seed,
        }
        if self.shared_prefix:
            facts |= {"shared_prefix_tokens": self.shared_prefix, "num_prefixes": self.num_prefixes}
        return facts
