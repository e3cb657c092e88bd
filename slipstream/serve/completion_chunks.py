"""How does a completion stream look on the wire? Chunks of `text_completion` and their order.

Order: each choice's echo before its first text, one finish reason a choice, usage last, then the end mark.
The common chunk is put together from bytes that are encoded once an answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.serve.logprobs import CompletionLogprobs, TokenNames
from slipstream.serve.streams import DONE, Arrival
from slipstream.serve.submission import AnswerHead, Usage, check_output

encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionForm:
    """What the answer to one body shows. `echoes` are the prompts' texts, None where they are not echoed."""

    num_samples: int
    num_logprobs: int | None
    names: TokenNames
    echoes: Sequence[str] | None
    returns_ids: bool
    wants_usage: bool
    wants_running_usage: bool

    def new_logprobs(self) -> CompletionLogprobs | None:
        if self.num_logprobs is None:
            return None
        return CompletionLogprobs(num_top=self.num_logprobs, names=self.names)


class CompletionChunks:
    """Writes one completion stream."""

    def __init__(self, head: AnswerHead, form: CompletionForm) -> None:
        self._form = form
        fields = head.fields("text_completion")
        self._fields = fields
        self._prefix = b"data: " + encode(fields)[:-1] + b',"choices":['
        self._suffix = b'],"usage":null}\n\n' if form.wants_usage else b"]}\n\n"
        self._usage = Usage()
        self._logprobs: dict[int, CompletionLogprobs | None] = {}
        self._is_plain = form.num_logprobs is None and not form.returns_ids and not form.wants_running_usage

    def write(self, items: Sequence[Arrival]) -> bytes:
        parts: list[bytes] = []
        for position, output in items:
            check_output(output)
            self._usage.add(position, output)
            for sample in output.outputs:
                index = position * self._form.num_samples + sample.index
                if index not in self._logprobs:
                    self._begin(parts, index, position, output)
                self._write_sample(parts, index, sample)
        return b"".join(parts)

    def _begin(self, parts: list[bytes], index: int, position: int, output: RequestOutput) -> None:
        logprobs = self._logprobs[index] = self._form.new_logprobs()
        form = self._form
        if form.echoes is None and not form.returns_ids:
            return
        echo = form.echoes[position] if form.echoes is not None else ""
        choice: dict[str, Any] = {"index": index, "text": echo, "logprobs": None, "finish_reason": None}
        if logprobs is not None and form.echoes is not None:
            choice["logprobs"] = logprobs.take(output.prompt_token_ids, output.prompt_logprobs or ())
        if form.returns_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        parts.append(self._chunk(choice))

    def _write_sample(self, parts: list[bytes], index: int, sample: CompletionOutput) -> None:
        if self._is_plain:
            if sample.finish_reason is None:
                if sample.text:
                    parts.append(self._plain(index, sample.text))
                return
        elif not (sample.text or sample.token_ids or sample.finish_reason):
            return
        choice: dict[str, Any] = {
            "index": index,
            "text": sample.text,
            "logprobs": None,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        logprobs = self._logprobs[index]
        if logprobs is not None and sample.logprobs is not None:
            choice["logprobs"] = logprobs.take(sample.token_ids, sample.logprobs)
        if self._form.returns_ids:
            choice["token_ids"] = sample.token_ids
        parts.append(self._chunk(choice))

    def _plain(self, index: int, text: str) -> bytes:
        return b'%b{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}%b' % (
            self._prefix,
            index,
            encode(text),
            self._suffix,
        )

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        if not self._form.wants_running_usage:
            return self._prefix + encode(choice) + self._suffix
        return (
            b"data: " + encode({**self._fields, "choices": [choice], "usage": self._usage.fields()}) + b"\n\n"
        )

    def finish(self) -> bytes:
        if not self._form.wants_usage:
            return DONE
        last = {**self._fields, "choices": [], "usage": self._usage.fields()}
        return b"data: " + encode(last) + b"\n\n" + DONE
