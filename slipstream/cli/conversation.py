"""What has been said so far? A chat's messages, which stay well-formed whatever interrupts an answer.

Invariant: between turns the messages are whole turns: a question whose answer failed is taken back, and one
whose answer was interrupted keeps what was shown of it. Later turns find the earlier ones in the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slipstream.cli.run import stream
from slipstream.core.errors import RequestError

if TYPE_CHECKING:
    from slipstream.core.outputs import RequestOutput
    from slipstream.core.sampling_params import SamplingParams
    from slipstream.llm import LLM

Message = dict[str, str]


class Conversation:
    """Turns of one chat with one model."""

    def __init__(self, llm: LLM, params: SamplingParams, *, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self.system = system
        self.turns: list[Message] = []
        self.num_tokens = 0

    @property
    def max_tokens(self) -> int:
        """The context: how many tokens of conversation and answer fit."""
        return self._llm.startup.limits.max_seq_len

    def reset(self, *, system: str | None = None) -> None:
        """Forget all turns; a `system` message given replaces the old one."""
        if system is not None:
            self.system = system
        self.turns = []
        self.num_tokens = 0

    def ask(self, question: str, write: Callable[[str], None]) -> RequestOutput:
        """Stream the answer to `question` into `write`, remember both, and return the last output.

        Raises RequestError, with code "context_length_exceeded" where question and history do not fit, and
        lets KeyboardInterrupt through once the request is aborted.
        """
        asked = [*self.turns, {"role": "user", "content": question}]
        shown: list[str] = []

        def show(piece: str) -> None:
            shown.append(piece)
            write(piece)

        generation = None
        try:
            generation = self._llm.chat_async(self._messages(asked), self._params, streaming=True)
            output = stream(generation, show)
        except KeyboardInterrupt:
            if generation is not None and shown:
                # The engine ends an aborted request after the step it is in.
                self._remember(asked, "".join(shown), generation.result())
            raise
        except RequestError as error:
            if error.code == "context_length_exceeded":
                raise self._does_not_fit(error) from error
            raise
        self._remember(asked, output.outputs[0].text, output)
        return output

    def _remember(self, asked: list[Message], answer: str, output: RequestOutput) -> None:
        self.turns = [*asked, {"role": "assistant", "content": answer}]
        self.num_tokens = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)

    def _messages(self, turns: list[Message]) -> list[Message]:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *turns]

    def _does_not_fit(self, error: RequestError) -> RequestError:
        return RequestError(
            f"This conversation no longer fits the context of {self.max_tokens:,} tokens ({error.message}) "
            "/reset starts afresh, a shorter question may fit, and --max-seq-len or --kv-cache-max-tokens "
            "may enlarge the context at the next start.",
            param="messages",
            code="context_length_exceeded",
        )
