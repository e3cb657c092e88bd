"""What does each choice of a completion stream hold? Its echo first, then text, with offsets that go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.serve.chunks import AnswerForm, Chunks
from slipstream.serve.logprobs import CompletionLogprobs
from slipstream.serve.submission import AnswerHead


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionForm(AnswerForm):
    """`echoes` are the prompts' texts, None where they are not echoed."""

    echoes: Sequence[str] | None = None

    def new_logprobs(self) -> CompletionLogprobs | None:
        if self.num_logprobs is None:
            return None
        return CompletionLogprobs(num_top=self.num_logprobs, names=self.names)


class CompletionChunks(Chunks):
    """Writes one completion stream."""

    kind = "text_completion"

    def __init__(self, head: AnswerHead, form: CompletionForm) -> None:
        super().__init__(head, form)
        self._echoes = form.echoes
        self._new_logprobs = form.new_logprobs
        self._logprobs: dict[int, CompletionLogprobs | None] = {}

    def beginning(self, index: int, position: int, output: RequestOutput) -> dict[str, Any] | None:
        logprobs = self._logprobs[index] = self._new_logprobs()
        if self._echoes is None and not self.form.returns_ids:
            return None
        echo = "" if self._echoes is None else self._echoes[position]
        choice: dict[str, Any] = {"index": index, "text": echo, "logprobs": None, "finish_reason": None}
        if logprobs is not None and self._echoes is not None:
            choice["logprobs"] = logprobs.take(output.prompt_token_ids, output.prompt_logprobs or ())
        if self.form.returns_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def plain(self, index: int, text: bytes) -> bytes:
        return b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}' % (index, text)

    def choice(self, index: int, sample: CompletionOutput) -> dict[str, Any]:
        logprobs, shown = self._logprobs[index], None
        if logprobs is not None and sample.logprobs is not None:
            shown = logprobs.take(sample.token_ids, sample.logprobs)
        return {"index": index, "text": sample.text, "logprobs": shown}
