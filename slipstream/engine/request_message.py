"""How does a `Request` cross to the engine's process, and could what arrived have passed its gate?

The door checked it in `Request.create`; the engine looks again, since a frame may come from anybody who can
reach the socket. Callables do not cross, and what only makes text (prompt, stop strings) stays at the door.
Invariant: every number of a request that `read_request` returns keeps the engine's `Limits`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from slipstream.core.beam_params import MAX_LENGTH_PENALTY, BeamParams
from slipstream.core.checks import check_text, checked_ids, integer, number, refused
from slipstream.core.errors import ConfigError, RequestError
from slipstream.core.kv_retention import KvCacheRetentionConfig, TokenRangeRetentionConfig
from slipstream.core.limits import Limits
from slipstream.core.plan import LogitsKind
from slipstream.core.request import (
    MAX_PRIORITY,
    MAX_REQUEST_ID_LENGTH,
    MAX_TIMEOUT_S,
    MAX_TOP_K,
    MIN_PRIORITY,
    SALT_PATTERN,
    Request,
)
from slipstream.core.sampling_params import RowSampling, SamplingParams
from slipstream.core.token_rules import check_something_left

Range = tuple[int, int | None, int, float | None]
# A request's clock may be ahead of the engine's by no more than this.
MAX_CLOCK_LEAD_S = 60.0


class RetentionMessage(msgspec.Struct, frozen=True, array_like=True):
    """A `KvCacheRetentionConfig`."""

    ranges: list[Range]
    decode_priority: int
    decode_duration_ms: float | None


class RequestMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the engine needs of a request. Times are on the monotonic clock, which all processes share."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: RowSampling
    max_tokens: int
    stop_token_ids: list[int]
    seed: int
    arrival_s: float
    num_samples: int = 1
    num_returned: int = 1
    cache_salt: str | None = None
    beams: BeamParams | None = None
    priority: int = 0
    deadline_s: float | None = None
    kv_retention: RetentionMessage | None = None
    logits: list[LogitsKind] = []


def message_of(request: Request) -> RequestMessage:
    """Return what crosses of a request. Raises RequestError for one that needs the engine in its process."""
    if request.processors or request.sampling.has_processors:
        raise RequestError(
            "logits_processor needs the engine in this process, and it runs in another; use logit_bias, "
            "bad_token_ids or allowed_token_ids, or LLM in your own program.",
            param="logits_processor",
            code="unsupported",
        )
    return RequestMessage(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        max_tokens=request.max_tokens,
        stop_token_ids=list(request.stop_token_ids),
        seed=request.seed,
        arrival_s=request.arrival_s,
        num_samples=request.num_samples,
        num_returned=request.num_returned,
        cache_salt=request.cache_salt,
        beams=request.beams,
        priority=request.priority,
        deadline_s=request.deadline_s,
        kv_retention=_retention_message(request.kv_retention),
        logits=list(request.logits),
    )


def read_request(message: RequestMessage, limits: Limits, *, prefix: str, now_s: float) -> Request:
    """Check what arrived and return it with `prefix` before its id. Raises RequestError."""
    check_text(message.request_id, "request_id", MAX_REQUEST_ID_LENGTH)
    _check_size(message, limits)
    _check_sampling(message.sampling, message.max_tokens, limits)
    _check_search(message, limits)
    _check_times(message, now_s)
    return Request(
        request_id=prefix + message.request_id,
        prompt_token_ids=message.prompt_token_ids,
        prompt=None,
        params=SamplingParams(),
        sampling=message.sampling,
        max_tokens=message.max_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        stop=(),
        seed=integer(message.seed, "seed", 0, 2**64 - 1),
        sample_idx=0,
        num_samples=message.num_samples,
        num_returned=message.num_returned,
        beams=message.beams,
        cache_salt=_checked_salt(message.cache_salt, limits),
        arrival_s=message.arrival_s,
        priority=integer(message.priority, "priority", MIN_PRIORITY, MAX_PRIORITY),
        deadline_s=message.deadline_s,
        kv_retention=_read_retention(message.kv_retention),
        logits=tuple(message.logits),
    )


def _check_size(message: RequestMessage, limits: Limits) -> None:
    num_prompt = integer(len(message.prompt_token_ids), "prompt_token_ids", 1, limits.max_seq_len - 1)
    checked_ids(message.prompt_token_ids, limits, "prompt_token_ids")
    # A request that embeds its prompt generates nothing.
    lowest = 0 if "hidden_states" in message.logits else 1
    integer(message.max_tokens, "max_tokens", lowest, limits.max_seq_len - num_prompt)
    integer(message.num_samples, "n", 1, limits.max_n)
    integer(message.num_returned, "n", 1, message.num_samples)
    most = limits.max_token_list + len(limits.eos_token_ids)
    _check_ids(message.stop_token_ids, "stop_token_ids", most, limits)
    if len(set(message.logits)) != len(message.logits):
        raise refused("logits", "names something twice")


def _check_ids(ids: Sequence[int], param: str, most: int, limits: Limits) -> None:
    integer(len(ids), param, 0, most)
    checked_ids(list(ids), limits, param)


def _check_sampling(sampling: RowSampling, max_tokens: int, limits: Limits) -> None:
    if sampling.has_processors:
        raise refused("logits_processor", "does not cross to another process")
    if sampling.temperature != 0.0:
        number(sampling.temperature, "temperature", limits.min_temperature, limits.max_temperature)
    integer(sampling.top_k, "top_k", 0, MAX_TOP_K)
    number(sampling.top_p, "top_p", 1e-300, 1.0)
    number(sampling.min_p, "min_p", 0.0, 1.0)
    bound = limits.max_penalty
    number(sampling.repetition_penalty, "repetition_penalty", 1 / bound, bound)
    number(sampling.presence_penalty, "presence_penalty", -bound, bound)
    number(sampling.frequency_penalty, "frequency_penalty", -bound, bound)
    _check_ids([token for token, _ in sampling.logit_bias], "logit_bias", limits.max_token_list, limits)
    for _, bias in sampling.logit_bias:
        number(bias, "logit_bias", -limits.max_logit_bias, limits.max_logit_bias)
    integer(sampling.min_tokens, "min_tokens", 0, max_tokens)
    _check_ids(sampling.stop_ids, "stop_ids", limits.max_token_list + len(limits.eos_token_ids), limits)
    _check_ids(sampling.allowed_ids, "allowed_token_ids", limits.vocab_size, limits)
    _check_ids(sampling.bad_ids, "bad_token_ids", limits.vocab_size, limits)
    check_something_left(sampling.allowed_ids, sorted(set(sampling.bad_ids)), limits)
    _check_bad_sequences(sampling.bad_sequences, limits)
    integer(sampling.no_repeat_ngram_size, "no_repeat_ngram_size", 0, limits.max_ngram_size)
    most = min(limits.max_logprobs, limits.vocab_size)
    integer(sampling.logprobs, "logprobs", -1, most)
    integer(sampling.prompt_logprobs, "prompt_logprobs", -1, most)


def _check_bad_sequences(sequences: Sequence[Sequence[int]], limits: Limits) -> None:
    # Each text comes in two spellings.
    integer(len(sequences), "bad", 0, 2 * limits.max_stop_strings)
    for sequence in sequences:
        integer(len(sequence), "bad", 2, limits.max_seq_len)
        checked_ids(list(sequence), limits, "bad")


def _check_search(message: RequestMessage, limits: Limits) -> None:
    beams, count = message.beams, message.sampling.num_candidates
    if beams is None:
        integer(count, "num_candidates", 0, 0)
        return
    integer(beams.width, "beam_width", 1, min(limits.max_beam_width, limits.vocab_size))
    # A search ends with as many outputs as it returns; whoever counts samples counts on it.
    integer(message.num_returned, "n", message.num_samples, beams.width)
    number(beams.length_penalty, "length_penalty", -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
    most = beams.width + len(message.stop_token_ids)
    integer(count, "num_candidates", 1, min(most, limits.vocab_size))


def _check_times(message: RequestMessage, now_s: float) -> None:
    if not math.isfinite(message.arrival_s) or message.arrival_s > now_s + MAX_CLOCK_LEAD_S:
        raise refused("arrival_s", "is no time that has been")
    if message.deadline_s is not None:
        number(message.deadline_s - message.arrival_s, "timeout_s", 0.0, MAX_TIMEOUT_S)


def _checked_salt(salt: str | None, limits: Limits) -> str | None:
    if salt is not None:
        check_text(salt, "cache_salt", limits.max_salt_length)
        if not SALT_PATTERN.fullmatch(salt):
            raise refused("cache_salt", "may hold printable ASCII without spaces only")
    return salt


def _retention_message(retention: KvCacheRetentionConfig | None) -> RetentionMessage | None:
    if retention is None:
        return None
    ranges: list[Range] = [
        (item.token_start, item.token_end, item.priority, item.duration_ms)
        for item in retention.token_range_retention_configs
    ]
    return RetentionMessage(ranges, retention.decode_retention_priority, retention.decode_duration_ms)


def _read_retention(message: RetentionMessage | None) -> KvCacheRetentionConfig | None:
    if message is None:
        return None
    try:
        ranges = [
            TokenRangeRetentionConfig(
                token_start=start, token_end=end, priority=priority, duration_ms=duration
            )
            for start, end, priority, duration in message.ranges
        ]
        return KvCacheRetentionConfig(
            token_range_retention_configs=ranges,
            decode_retention_priority=message.decode_priority,
            decode_duration_ms=message.decode_duration_ms,
        )
    except ConfigError as error:
        raise RequestError(str(error), param="kv_cache_retention_config") from None
