"""How does a chat stream look on the wire? Chunks of `chat.completion.chunk` and their order.

Order: the role of each choice once, then its content, one finish reason a choice, usage last, the end mark.
The common chunk is put together from bytes that are encoded once an answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.serve.logprobs import TokenNames, chat_logprobs
from slipstream.serve.streams import DONE, Arrival
from slipstream.serve.submission import AnswerHead, Usage, check_output

encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatForm:
    """What the answer to one body shows."""

    num_logprobs: int | None
    names: TokenNames
    returns_ids: bool
    wants_usage: bool
    wants_running_usage: bool

    def logprobs(self, sample: CompletionOutput) -> dict[str, Any] | None:
        if self.num_logprobs is None or sample.logprobs is None:
            return None
        return chat_logprobs(sample.token_ids, sample.logprobs, num_top=self.num_logprobs, names=self.names)


class ChatChunks:
    """Writes one chat stream."""

    def __init__(self, head: AnswerHead, form: ChatForm) -> None:
        self._form = form
        self._fields = head.fields("chat.completion.chunk")
        self._prefix = b"data: " + encode(self._fields)[:-1] + b',"choices":['
        self._suffix = b'],"usage":null}\n\n' if form.wants_usage else b"]}\n\n"
        self._usage = Usage()
        self._begun: set[int] = set()
        self._is_plain = form.num_logprobs is None and not form.returns_ids and not form.wants_running_usage

    def write(self, items: Sequence[Arrival]) -> bytes:
        parts: list[bytes] = []
        for position, output in items:
            check_output(output)
            self._usage.add(position, output)
            for sample in output.outputs:
                if sample.index not in self._begun:
                    self._begin(parts, sample.index, output)
                self._write_sample(parts, sample)
        return b"".join(parts)

    def _begin(self, parts: list[bytes], index: int, output: RequestOutput) -> None:
        self._begun.add(index)
        delta = {"role": "assistant", "content": ""}
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if self._form.returns_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        parts.append(self._chunk(choice))

    def _write_sample(self, parts: list[bytes], sample: CompletionOutput) -> None:
        if self._is_plain:
            if sample.finish_reason is None:
                if sample.text:
                    parts.append(self._plain(sample.index, sample.text))
                return
        elif not (sample.text or sample.token_ids or sample.finish_reason):
            return
        choice: dict[str, Any] = {
            "index": sample.index,
            "delta": {"content": sample.text} if sample.text else {},
            "logprobs": self._form.logprobs(sample),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if self._form.returns_ids:
            choice["token_ids"] = sample.token_ids
        parts.append(self._chunk(choice))

    def _plain(self, index: int, text: str) -> bytes:
        return b'%b{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}%b' % (
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
