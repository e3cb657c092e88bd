"""May this request run, and what exactly is asked? `Request.create` is the one gate below every entry point.

Invariant: every number of an existing `Request` lies between a minimum and a maximum of `Limits`, so nothing
below checks again, and Python, HTTP and batch refuse the same things with the same words. A check costs no
more than the size of what it accepts: lengths and caps come before contents.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from slipstream.core.beam_params import BeamParams, beam_params
from slipstream.core.checks import (
    check_text,
    checked_ids,
    context_error,
    integer,
    listed,
    number,
    refused,
    shown,
)
from slipstream.core.errors import RequestError
from slipstream.core.kv_retention import KvCacheRetentionConfig
from slipstream.core.limits import Limits
from slipstream.core.plan import LogitsKind
from slipstream.core.sampling_params import RowSampling, SamplingParams
from slipstream.core.token_rules import (
    EncodeBad,
    LogitsProcessor,
    ProcessorStyle,
    allowed_ids,
    bad_tokens,
    check_something_left,
    ngram_size,
    processors,
)

SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1
MAX_TOP_K = 2**31 - 1
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1
MAX_TIMEOUT_S = 30 * 24 * 3600.0
MAX_REQUEST_ID_LENGTH = 256
SALT_PATTERN = re.compile(r"[!-~]+")
FLAGS = (
    "ignore_eos",
    "detokenize",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "return_context_logits",
    "return_generation_logits",
)
# Known names that this version does not serve, with the value that means "not asked for".
UNSERVED: dict[str, bool | int | None] = {
    "guided_decoding": None,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What a caller may say of a request beside its sampling: every door takes these by name.

    `timeout_s` bounds its life, queue included. `kv_retention` says how long its cached content is kept.
    """

    timeout_s: float | None = None
    kv_retention: KvCacheRetentionConfig | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One checked prompt with everything resolved; frozen, so any thread may read it.

    `max_tokens` is never None. `stop_token_ids` are the ids that end the request, `stop` the strings. The
    noise of sample i at output position p is a function of (`seed`, i, p) alone. Lower `priority` runs
    earlier. Of `num_samples`, the likeliest `num_returned` are shown; a beam search (`beams`) is one sequence
    to the engine and yields all n outputs at its end. `deadline_s` is on the monotonic clock;
    `logits` names what the request wants beside tokens; `processors` are its callables, which never cross to
    another process. `kv_params` is opaque to everyone but a KV connector.
    """

    request_id: str
    prompt_token_ids: list[int]
    prompt: str | None
    params: SamplingParams
    sampling: RowSampling
    max_tokens: int
    stop_token_ids: frozenset[int]
    stop: tuple[str, ...]
    seed: int
    sample_idx: int
    num_samples: int
    cache_salt: str | None
    arrival_s: float
    num_returned: int = 1
    beams: BeamParams | None = None
    priority: int = 0
    deadline_s: float | None = None
    kv_retention: KvCacheRetentionConfig | None = None
    logits: tuple[LogitsKind, ...] = ()
    processors: tuple[tuple[ProcessorStyle, LogitsProcessor], ...] = ()
    kv_params: Any = None
    lora: None = None

    @classmethod
    def create(
        cls,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        limits: Limits,
        *,
        request_id: str,
        prompt: str | None = None,
        default_seed: int | None = None,
        arrival_s: float | None = None,
        options: RequestOptions | None = None,
        encode_bad: EncodeBad | None = None,
    ) -> Request:
        """Check everything against `limits` and resolve what is unset.

        `default_seed` seeds a request that brings none; the caller varies it per request. With neither, the
        seed is fresh randomness. `arrival_s` is on the monotonic clock; a time-out counts from it.
        `encode_bad` returns the token sequences that spell a bad text. Raises RequestError.
        """
        if not isinstance(cast(object, params), SamplingParams):
            raise refused("params", f"must be a SamplingParams, not {shown(params)}")
        check_text(request_id, "request_id", MAX_REQUEST_ID_LENGTH)
        if prompt is not None and prompt != "":
            check_text(prompt, "prompt", None)
        _check_served(params)
        ids = _prompt_ids(_truncated(prompt_token_ids, params, limits), limits)
        max_tokens = _max_tokens(params.max_tokens, len(ids), limits)
        stop_ids = _stop_token_ids(params, limits)
        seed = default_seed if params.seed is None else params.seed
        if seed is None:
            seed = secrets.randbits(64)
        num_returned = integer(params.n, "n", 1, limits.max_n)
        arrival_s = time.monotonic() if arrival_s is None else arrival_s
        options = options or RequestOptions()
        sampling = _row_sampling(params, limits, max_tokens, stop_ids, encode_bad)
        beams = beam_params(params, sampling, limits)
        if beams is not None:
            sampling = _of_search(sampling, beams, len(stop_ids), limits)
        return cls(
            request_id=request_id,
            prompt_token_ids=ids,
            prompt=prompt,
            params=params,
            sampling=sampling,
            beams=beams,
            max_tokens=max_tokens,
            stop_token_ids=stop_ids,
            stop=_stop_strings(params, limits),
            seed=integer(seed, "seed", SEED_MIN, SEED_MAX) % 2**64,
            sample_idx=0,
            num_samples=_best_of(params, num_returned, limits),
            num_returned=num_returned,
            cache_salt=_cache_salt(params.cache_salt, limits),
            arrival_s=arrival_s,
            priority=integer(params.priority, "priority", MIN_PRIORITY, MAX_PRIORITY, "lower is earlier"),
            deadline_s=_deadline(options.timeout_s, arrival_s),
            kv_retention=_kv_retention(options.kv_retention),
            logits=_logits(params),
            processors=processors(params.logits_processor),
        )

    def samples(self) -> list[Request]:
        """Return the n requests this one stands for; they share the prompt list and the seed.

        The prompt's logits are the same for all, so only the first asks for them. A search is one.
        """
        if self.num_samples == 1 or self.beams is not None:
            return [self]
        own: tuple[LogitsKind, ...] = ("generation_logits",) if "generation_logits" in self.logits else ()
        return [
            dataclasses.replace(self, sample_idx=i, num_samples=1, logits=own if i else self.logits)
            for i in range(self.num_samples)
        ]

    @property
    def needs_host_tokens(self) -> bool:
        """Say whether every step of it must wait until the host knows the tokens of the one before."""
        return bool(self.processors)


def _row_sampling(
    params: SamplingParams,
    limits: Limits,
    max_tokens: int,
    stop_ids: frozenset[int],
    encode_bad: EncodeBad | None,
) -> RowSampling:
    """Resolve what a row carries. A greedy row carries no filters: they never remove the likeliest token."""
    temperature = _temperature(params, limits)
    top_k = (
        0 if params.top_k is None else integer(params.top_k, "top_k", -1, MAX_TOP_K, "-1 or 0 turn it off")
    )
    top_p = 1.0 if params.top_p is None else number(params.top_p, "top_p", 0.0, 1.0, "1 turns it off")
    if top_p == 0.0:
        raise refused("top_p", "must be above 0 and at most 1, not 0; use temperature=0 for greedy")
    min_p = 0.0 if params.min_p is None else number(params.min_p, "min_p", 0.0, 1.0, "0 turns it off")
    bound = limits.max_penalty
    min_tokens = integer(
        params.min_tokens, "min_tokens", 0, max_tokens, f"it may not exceed max_tokens ({max_tokens})"
    )
    is_greedy = temperature == 0.0
    allowed = allowed_ids(params.allowed_token_ids, limits)
    bad, bad_sequences = bad_tokens(params.bad_token_ids, params.bad, limits, encode_bad)
    check_something_left(allowed, bad, limits)
    return RowSampling(
        temperature=temperature,
        top_k=0 if is_greedy or top_k < 0 or top_k >= limits.vocab_size else top_k,
        top_p=1.0 if is_greedy else top_p,
        min_p=0.0 if is_greedy else min_p,
        repetition_penalty=number(
            params.repetition_penalty, "repetition_penalty", 1 / bound, bound, "1 turns it off"
        ),
        presence_penalty=number(params.presence_penalty, "presence_penalty", -bound, bound, "0 turns it off"),
        frequency_penalty=number(
            params.frequency_penalty, "frequency_penalty", -bound, bound, "0 turns it off"
        ),
        logit_bias=_logit_bias(params.logit_bias, limits),
        min_tokens=min_tokens,
        stop_ids=tuple(sorted(stop_ids)) if min_tokens else (),
        allowed_ids=allowed,
        bad_ids=bad,
        bad_sequences=bad_sequences,
        no_repeat_ngram_size=ngram_size(params.no_repeat_ngram_size, limits),
        # Samples are ranked by their likelihood, whether or not anybody looks at it.
        logprobs=max(_logprobs(params.logprobs, "logprobs", limits), -1 if params.best_of is None else 0),
        prompt_logprobs=_logprobs(params.prompt_logprobs, "prompt_logprobs", limits),
        has_processors=bool(processors(params.logits_processor)),
    )


def _of_search(sampling: RowSampling, beams: BeamParams, num_stops: int, limits: Limits) -> RowSampling:
    """Let each step bring what a search may pick: `width` tokens that go on, however many end beside them."""
    if sampling.allowed_ids and len(sampling.allowed_ids) < beams.width:
        raise refused(
            "allowed_token_ids",
            f"allows {len(sampling.allowed_ids)} tokens, and beam_width={beams.width} needs as many to start "
            "from; allow more or lower beam_width",
        )
    count = min(beams.width + num_stops, limits.vocab_size)
    return msgspec.structs.replace(sampling, num_candidates=count)


def _temperature(params: SamplingParams, limits: Limits) -> float:
    """Unset is greedy, or 1.0 once top_p or top_k is set. Tiny values are refused, not rounded to greedy."""
    if params.temperature is None:
        return 0.0 if params.top_p is None and params.top_k is None else 1.0
    low, high = limits.min_temperature, limits.max_temperature
    value = number(params.temperature, "temperature", 0.0, high, "use 0 for greedy")
    if 0.0 < value < low:
        what = f"must be 0 or from {low:g} to {high:g}, not {shown(value)}; use 0 for greedy"
        raise refused("temperature", what)
    return value


def _logprobs(given: int | None, param: str, limits: Limits) -> int:
    if given is None:
        return -1
    return integer(given, param, 0, min(limits.max_logprobs, limits.vocab_size))


def _best_of(params: SamplingParams, num_returned: int, limits: Limits) -> int:
    """Return how many samples to generate, of which the likeliest `num_returned` are shown."""
    if params.best_of is None:
        return num_returned
    return integer(
        params.best_of, "best_of", num_returned, limits.max_n, f"it may not be below n ({num_returned})"
    )


def _logits(params: SamplingParams) -> tuple[LogitsKind, ...]:
    """Name what is wanted beside tokens, in the order of `StepPlan.logits`."""
    wanted: dict[LogitsKind, bool] = {
        "prompt_logprobs": params.prompt_logprobs is not None,
        "context_logits": params.return_context_logits,
        "generation_logits": params.return_generation_logits,
    }
    return tuple(kind for kind, is_wanted in wanted.items() if is_wanted)


def _truncated(given: Any, params: SamplingParams, limits: Limits) -> Any:
    """Keep the last tokens of a prompt as asked; -1 keeps what leaves room for `max_tokens`."""
    if params.truncate_prompt_tokens is None:
        return given
    hint = "-1 keeps as many as fit"
    keep = integer(params.truncate_prompt_tokens, "truncate_prompt_tokens", -1, None, hint)
    if keep == 0:
        raise refused("truncate_prompt_tokens", f"must be -1 or at least 1, not 0; {hint}")
    if keep < 0:
        asked = params.max_tokens
        room = asked if type(asked) is int and 1 <= asked < limits.max_seq_len else 1
        keep = limits.max_seq_len - room
    # Anything that is no list of ids is refused by the check that follows.
    prompt: Any = given
    if isinstance(given, list | tuple) or getattr(given, "ndim", 0) == 1:
        prompt = cast(Any, given)[-keep:]
    return prompt


def _prompt_ids(given: Sequence[int], limits: Limits) -> list[int]:
    ids = listed(given, "prompt_token_ids", limits.max_seq_len - 1, "max_seq_len - 1", context_error)
    if not ids:
        raise refused("prompt_token_ids", "is empty; give at least one token")
    return checked_ids(ids, limits, "prompt_token_ids")


def _max_tokens(given: int | None, num_prompt: int, limits: Limits) -> int:
    room = limits.max_seq_len - num_prompt
    if given is None:
        return room
    value = integer(given, "max_tokens", 1, None, "leave it None to fill the context")
    if value > room:
        raise context_error(
            "max_tokens",
            f"is {shown(value)} after a prompt of {num_prompt} tokens, and the two together may not exceed "
            f"{limits.max_seq_len}; shorten the prompt or ask for at most {room}",
        )
    return value


def _stop_token_ids(params: SamplingParams, limits: Limits) -> frozenset[int]:
    """The user's ids and the model's. An EOS id beyond the embedding can never be sampled and is left out."""
    eos = () if params.ignore_eos else (i for i in limits.eos_token_ids if 0 <= i < limits.vocab_size)
    if params.stop_token_ids is None:
        return frozenset(eos)
    ids = listed(params.stop_token_ids, "stop_token_ids", limits.max_token_list, "the cap")
    return frozenset(eos).union(checked_ids(ids, limits, "stop_token_ids"))


def _stop_strings(params: SamplingParams, limits: Limits) -> tuple[str, ...]:
    if params.stop is None:
        return ()
    given = [params.stop] if isinstance(params.stop, str) else params.stop
    strings = listed(given, "stop", limits.max_stop_strings, "the cap")
    for i, text in enumerate(strings):
        check_text(text, f"stop[{i}]", limits.max_stop_length)
    if strings and not params.detokenize:
        raise refused("stop", "needs text, and detokenize=False makes none; use stop_token_ids instead")
    return tuple(strings)


def _logit_bias(given: Mapping[int, float] | None, limits: Limits) -> tuple[tuple[int, float], ...]:
    if given is None:
        return ()
    if not isinstance(cast(object, given), Mapping):
        raise refused("logit_bias", f"must map token ids to numbers, not be {shown(given)}")
    if len(given) > limits.max_token_list:
        raise refused("logit_bias", f"has {len(given)} entries, at most {limits.max_token_list} are allowed")
    bias: dict[int, float] = {}
    for key, value in given.items():
        token_id = integer(key, "logit_bias[key]", 0, limits.vocab_size - 1, "keys are token ids")
        bound = limits.max_logit_bias
        bias[token_id] = number(value, f"logit_bias[{token_id}]", -bound, bound)
    return tuple(sorted(bias.items()))


def _deadline(given: float | None, arrival_s: float) -> float | None:
    if given is None:
        return None
    value = number(given, "timeout_s", 0.0, MAX_TIMEOUT_S, "leave it None for no time-out")
    if value == 0.0:
        raise refused("timeout_s", "must be above 0 seconds, not 0; leave it None for no time-out")
    return arrival_s + value


def _kv_retention(given: KvCacheRetentionConfig | None) -> KvCacheRetentionConfig | None:
    if given is not None and not isinstance(cast(object, given), KvCacheRetentionConfig):
        raise refused("kv_cache_retention_config", f"must be a KvCacheRetentionConfig, not {shown(given)}")
    return given


def _cache_salt(given: str | None, limits: Limits) -> str | None:
    if given is None:
        return None
    check_text(given, "cache_salt", limits.max_salt_length)
    if not SALT_PATTERN.fullmatch(given):
        raise refused("cache_salt", "may hold printable ASCII without spaces only; encode it, e.g. as hex")
    return given


def _check_served(params: SamplingParams) -> None:
    for name, unset in UNSERVED.items():
        value = getattr(params, name)
        if value is unset:
            continue
        raise RequestError(
            f"{name}={shown(value)} is not served by this version; leave it unset ({unset!r}).",
            param=name,
            code="unsupported",
        )
    for name in FLAGS:
        if not isinstance(getattr(params, name), bool):
            raise refused(name, f"must be True or False, not {shown(getattr(params, name))}")
