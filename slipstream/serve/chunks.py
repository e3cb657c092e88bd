"""How does a streamed answer look on the wire? Events of one choice each, in the order of the protocol.

Order: what begins a choice once and first, then its text, one finish reason a choice, usage last, then the
end mark. The common event, a piece of text and nothing else, is put together from bytes that are encoded
once.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.serve.logprobs import TokenNames
from slipstream.serve.streams import DONE, Arrival
from slipstream.serve.submission import AnswerHead, Usage, check_output

encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """What the answer to one body shows. `num_logprobs` None shows no log-probabilities."""

    num_samples: int = 1
    num_logprobs: int | None
    names: TokenNames
    returns_ids: bool
    wants_usage: bool
    wants_running_usage: bool


class Chunks(abc.ABC):
    """Writes one stream. A kind of answer says how its choices begin and what they hold."""

    kind = ""

    def __init__(self, head: AnswerHead, form: AnswerForm) -> None:
        self.form = form
        self._fields = head.fields(self.kind)
        self._prefix = b"data: " + encode(self._fields)[:-1] + b',"choices":['
        self._suffix = b'],"usage":null}\n\n' if form.wants_usage else b"]}\n\n"
        self._usage = Usage()
        self._begun: set[int] = set()
        self._is_plain = form.num_logprobs is None and not form.returns_ids and not form.wants_running_usage

    @abc.abstractmethod
    def beginning(self, index: int, position: int, output: RequestOutput) -> dict[str, Any] | None:
        """Return what comes before a choice's first text, None for nothing."""

    @abc.abstractmethod
    def plain(self, index: int, text: bytes) -> bytes:
        """Return the JSON of a choice that holds a piece of text, given as JSON, and nothing else."""

    @abc.abstractmethod
    def choice(self, index: int, sample: CompletionOutput) -> dict[str, Any]:
        """Return a choice that holds what is new of a sample."""

    def write(self, items: Sequence[Arrival]) -> bytes:
        """Return the events of these outputs. Raises RequestError where one says that its request failed."""
        parts: list[bytes] = []
        for position, output in items:
            check_output(output)
            self._usage.add(position, output)
            for sample in output.outputs:
                self._write_sample(parts, position, output, sample)
        return b"".join(parts)

    def _write_sample(
        self, parts: list[bytes], position: int, output: RequestOutput, sample: CompletionOutput
    ) -> None:
        index = position * self.form.num_samples + sample.index
        if index not in self._begun:
            self._begun.add(index)
            beginning = self.beginning(index, position, output)
            if beginning is not None:
                parts.append(self._event(beginning))
        if self._is_plain and sample.finish_reason is None:
            # A token that ends in half a character has no text yet.
            if sample.text:
                parts.append(self._prefix + self.plain(index, encode(sample.text)) + self._suffix)
            return
        choice = self.choice(index, sample)
        choice |= {"finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason}
        if self.form.returns_ids:
            choice["token_ids"] = sample.token_ids
        parts.append(self._event(choice))

    def _event(self, choice: dict[str, Any]) -> bytes:
        if not self.form.wants_running_usage:
            return self._prefix + encode(choice) + self._suffix
        chunk = {**self._fields, "choices": [choice], "usage": self._usage.fields()}
        return b"data: " + encode(chunk) + b"\n\n"

    def finish(self) -> bytes:
        """Return the events that come after the last output, up to the end mark."""
        if not self.form.wants_usage:
            return DONE
        last = {**self._fields, "choices": [], "usage": self._usage.fields()}
        return b"data: " + encode(last) + b"\n\n" + DONE
