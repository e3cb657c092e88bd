"""How long are prompts and answers? Distributions to draw from, with their parameters in the record.

`LogNormal` has the shape of chat traffic: most texts are short and a few very long. The numbers of `SHAREGPT`
give about the lengths of ShareGPT's first turns as serving benchmarks cut them (prompts of 220 tokens in the
mean, answers of 200, none above 1,024); nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import math
from random import Random
from typing import Protocol

from slipstream.core.errors import ConfigError


class Lengths(Protocol):
    """A distribution over whole numbers from 1. `describe` says what a reader of the record needs."""

    def draw(self, generator: Random) -> int: ...

    def describe(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Every length from `low` to `high` alike; a fixed length is both."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ConfigError(
                f"Lengths from {self.low} to {self.high} are no range; the lower end must be at least 1 and "
                "at most the upper."
            )

    def draw(self, generator: Random) -> int:
        return self.low if self.low == self.high else generator.randint(self.low, self.high)

    def describe(self) -> str:
        return f"{self.low}" if self.low == self.high else f"uniform {self.low} to {self.high}"


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """exp of a normal distribution; what falls outside the bounds is drawn anew, so they cut, not pile up."""

    median: float
    sigma: float
    low: int = 4
    high: int = 1024

    def __post_init__(self) -> None:
        if not (self.low <= self.median <= self.high and self.sigma > 0):
            raise ConfigError(
                f"A log-normal distribution of median {self.median:g} and sigma {self.sigma:g} does not lie "
                f"between {self.low} and {self.high}; give a median in between and a sigma above 0."
            )

    def draw(self, generator: Random) -> int:
        # The median is inside the bounds, so a draw is outside at most half of the time.
        while True:
            length = round(math.exp(generator.gauss(math.log(self.median), self.sigma)))
            if self.low <= length <= self.high:
                return length

    def describe(self) -> str:
        return f"log-normal, median {self.median:g}, sigma {self.sigma:g}, {self.low} to {self.high}"


# (prompt, answer)
SHAREGPT = (LogNormal(median=156.0, sigma=1.2), LogNormal(median=150.0, sigma=1.0))
