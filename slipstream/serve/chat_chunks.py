"""What does each choice of a chat stream hold? Its role first, then content."""

from __future__ import annotations

import dataclasses
from typing import Any

from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.serve.chunks import AnswerForm, Chunks
from slipstream.serve.logprobs import chat_logprobs
from slipstream.serve.submission import AnswerHead


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatForm(AnswerForm):
    """A chat's answer."""

    def logprobs(self, sample: CompletionOutput) -> dict[str, Any] | None:
        if self.num_logprobs is None or sample.logprobs is None:
            return None
        return chat_logprobs(sample.token_ids, sample.logprobs, num_top=self.num_logprobs, names=self.names)


class ChatChunks(Chunks):
    """Writes one chat stream."""

    kind = "chat.completion.chunk"

    def __init__(self, head: AnswerHead, form: ChatForm) -> None:
        super().__init__(head, form)
        self._logprobs = form.logprobs

    def beginning(self, index: int, position: int, output: RequestOutput) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if self.form.returns_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def plain(self, index: int, text: bytes) -> bytes:
        return b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}' % (index, text)

    def choice(self, index: int, sample: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": sample.text} if sample.text else {},
            "logprobs": self._logprobs(sample),
        }
