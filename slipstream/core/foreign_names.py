"""What is known of a name that people bring from another engine? The record behind each row of the tables.

Invariant: a row is taken, or refused with what to use instead; there is no third way.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Kind = Literal["same", "alias", "converted", "refused"]
ENGINES = {"T": "TensorRT-LLM", "V": "vLLM", "S": "SGLang"}


@dataclasses.dataclass(frozen=True, slots=True)
class ForeignName:
    """One name as it is typed elsewhere.

    `engines` are letters of `ENGINES`, none for a name that only OpenAI's API has. `example` is a value that
    shows the name in use and that tests pass. `ours` is the name it stands for here, empty where it is
    refused; `note` says how the meaning differs, or what to use where it is refused.
    """

    name: str
    engines: str
    example: Any
    ours: str = ""
    note: str = ""

    @property
    def kind(self) -> Kind:
        if not self.ours:
            return "refused"
        if self.note:
            return "converted"
        return "same" if self.name == self.ours else "alias"

    @property
    def origin(self) -> str:
        return ", ".join(ENGINES[letter] for letter in self.engines) or "OpenAI"


def same(name: str, engines: str, example: Any, note: str = "") -> ForeignName:
    return ForeignName(name, engines, example, name, note)


def alias(name: str, engines: str, example: Any, ours: str, note: str = "") -> ForeignName:
    return ForeignName(name, engines, example, ours, note)


def refused(name: str, engines: str, example: Any, note: str) -> ForeignName:
    return ForeignName(name, engines, example, "", note)
