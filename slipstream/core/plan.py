"""What crosses between the scheduler and the ranks: `StepPlan` down, `StepResult` up.

A plan is a delta over persistent rows, applied in the order of its fields: removed, added, new_blocks,
tokens, copies and loads, forward over the spans, sample, stores. Its size grows with what changed, never with
the context. All of it is msgspec, so the same bytes go to every rank, and a recorded plan replays.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from slipstream.core.sampling_params import RowSampling

Stream = Literal["decoder", "encoder"]
LogitsKind = Literal["prompt_logprobs", "context_logits", "generation_logits", "hidden_states"]


class Span(msgspec.Struct, frozen=True):
    """`len` consecutive tokens of one row to run through the model, from position `start`.

    Prefill, chunk, decode and draft verification differ only in `len`. `start` is exact for prompt spans and
    an upper bound elsewhere: the length on the device decides. `parents[i]` is the span offset of the parent
    of draft token i in a tree, -1 where that is the last committed token; siblings share a position, not a
    slot.
    """

    row: int
    start: int
    len: int
    stream: Stream = "decoder"
    causal: bool = True
    parents: tuple[int, ...] | None = None


class RequestInit(msgspec.Struct, frozen=True):
    """Everything a runner needs to hold a request in `row`.

    `tokens` are the prompt and, after a preemption, the tokens generated so far; the first `num_computed` of
    them already stand in the cache. `blocks[g]` is the block table of cache group g, 0 (the null page) where
    a window no longer needs the entry.
    """

    row: int
    request_id: str
    tokens: list[int]
    num_prompt: int
    num_computed: int
    blocks: list[list[int]]
    sampling: RowSampling
    seed: int
    sample_idx: int


class StepPlan(msgspec.Struct, omit_defaults=True):
    """One step for the ranks of one replica. `copies` are (source page, destination page)."""

    step_id: int
    removed: list[int] = []
    added: list[RequestInit] = []
    new_blocks: dict[int, list[tuple[int, list[int]]]] = {}
    tokens: list[tuple[int, int, list[int]]] = []
    copies: list[tuple[int, int]] = []
    loads: list[tuple[int, int]] = []
    spans: list[Span] = []
    sample: list[int] = []
    logits: list[tuple[int, int, int, LogitsKind]] = []
    stores: list[tuple[int, int]] = []

    @property
    def num_tokens(self) -> int:
        return sum([span.len for span in self.spans])


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Raw log-softmax of one position: the sampled token, its rank (1 = most likely) and the most likely.

    One a token: Python's collector has no cycle to find here, and does not walk them.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Candidates(msgspec.Struct, frozen=True):
    """How one row could go on: its leading allowed tokens in order, raw log-softmax, and rank among all."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class StepResult(msgspec.Struct, omit_defaults=True):
    """What a step produced. A failing row is an entry of `row_errors`, never an exception.

    `error_codes` names the kind of a row's error where it is not `numerical_error`. `extras[row]` are
    (what, first position, values) in the order of `StepPlan.logits`: `TokenLogprobs` or a float32 array.
    `candidates` are of the rows whose `RowSampling.num_candidates` asks for them.
    """

    step_id: int
    tokens: dict[int, list[int]] = {}
    executed_tokens: int = 0
    logprobs: dict[int, list[TokenLogprobs]] = {}
    candidates: dict[int, Candidates] = {}
    accepted_path: dict[int, list[int]] = {}
    extras: dict[int, Any] = {}
    kv_done: list[str] = []
    kv_failed: list[int] = []
    row_errors: dict[int, str] = {}
    error_codes: dict[int, str] = {}


def encode(record: StepPlan | StepResult) -> bytes:
    return msgspec.msgpack.encode(record)


def decode_plan(data: bytes) -> StepPlan:
    return msgspec.msgpack.decode(data, type=StepPlan)


def decode_result(data: bytes) -> StepResult:
    return msgspec.msgpack.decode(data, type=StepResult)
