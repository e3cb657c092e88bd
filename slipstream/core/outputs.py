"""What does a user get back? `RequestOutput`, its `CompletionOutput`s and the events they are made from."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import msgspec

from slipstream.core.errors import RequestError
from slipstream.core.plan import TokenLogprobs

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


class TokenEvent(msgspec.Struct, omit_defaults=True, gc=False):
    """One element of an engine's event stream: new tokens of one sample of one request.

    One a token, in no cycle: Python's collector does not walk them.

    `index` is the sample of n. `finish_reason` is None while the sample goes on; `stop_reason` is the stop
    token id that ended it. `cumulative_logprob` is set where an output comes whole. `error` is (message,
    code). `extras` are (what, first position, values) of what the request wanted beside tokens, in the order
    of `StepPlan.logits`. The first token after an admission and the last event say how the sample came to it:
    `admitted_s` is when it first ran, on the clock of `Request.arrival_s`, and `num_preemptions` how often it
    had to start again.
    """

    request_id: str
    index: int
    new_token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    cumulative_logprob: float | None = None
    error: tuple[str, str] | None = None
    extras: list[Any] = []
    admitted_s: float | None = None
    num_preemptions: int = 0


class Logprob(msgspec.Struct, gc=False):
    """Log-probability of one token at one position; `rank` 1 is the most likely.

    Millions of them may be alive: Python's collector does not walk them, for they refer to nothing that could
    refer back.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclasses.dataclass(slots=True)
class RequestMetrics:
    """Seconds on the monotonic clock; None until the event happened.

    `admitted_s` is when its first sample first ran, `last_token_s` when the newest tokens came.
    `num_preemptions` and `num_output_tokens` are of all samples.
    """

    arrival_s: float
    first_token_s: float | None = None
    finished_s: float | None = None
    admitted_s: float | None = None
    last_token_s: float | None = None
    num_preemptions: int = 0
    num_output_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        return _between(self.arrival_s, self.first_token_s)

    @property
    def queue_s(self) -> float | None:
        return _between(self.arrival_s, self.admitted_s)

    @property
    def prefill_s(self) -> float | None:
        """From the first step it ran in to its first token."""
        return _between(self.admitted_s, self.first_token_s)

    @property
    def decode_s(self) -> float | None:
        """From its first token to its last."""
        return _between(self.first_token_s, self.last_token_s)

    @property
    def e2e_s(self) -> float | None:
        return _between(self.arrival_s, self.finished_s)


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One sample. `text_diff` and `token_ids_diff` are what the last streamed update added.

    `generation_logits` are the model's own float32 logits [tokens, V], a torch tensor on the CPU, once the
    sample has ended.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list[int])
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text_diff: str = ""
    token_ids_diff: list[int] = dataclasses.field(default_factory=list[int])
    generation_logits: Any = None


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """One prompt's result. `error` is None or why this prompt, and no other, failed.

    `prompt_logprobs` begin with None: nothing says how likely the first token was. `context_logits` are the
    model's float32 logits [prompt, V], a torch tensor on the CPU. Both come with the first token.
    `hidden_states` are float32 numpy arrays [chunk, D], one after the other, of a request that embeds.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    context_logits: Any = None
    error: RequestError | None = None
    hidden_states: list[Any] = dataclasses.field(default_factory=list[Any])


@dataclasses.dataclass(slots=True)
class EmbeddingOutput:
    """One prompt's vector: `embedding` is a float32 numpy array [D], or None where `error` says why."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    embedding: Any = None
    error: RequestError | None = None
