"""May this request run, and what exactly is asked? `Request.create` is the one gate below every entry point.

Invariant: every number of an existing `Request` lies between a minimum and a maximum of `Limits`, so nothing
below checks again, and Python, HTTP and batch refuse the same things with the same words. A check costs no
more than the size of what it accepts: lengths and caps come before contents.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from slipstream.core.errors import RequestError
from slipstream.core.kv_retention import KvCacheRetentionConfig
from slipstream.core.limits import Limits
from slipstream.core.plan import LogitsKind
from slipstream.core.sampling_params import RowSampling, SamplingParams

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
)
# Known names that this version does not serve, with the value that means "not asked for".
UNSERVED: dict[str, bool | int | None] = {
    "best_of": None,
    "use_beam_search": False,
    "beam_width": None,
    "length_penalty": None,
    "early_stopping": None,
    "bad": None,
    "bad_token_ids": None,
    "allowed_token_ids": None,
    "no_repeat_ngram_size": None,
    "prompt_logprobs": None,
    "return_context_logits": False,
    "return_generation_logits": False,
    "truncate_prompt_tokens": None,
    "guided_decoding": None,
    "logits_processor": None,
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
    earlier. `deadline_s` is on the monotonic clock; `logits` names what the request wants beside tokens.
    `kv_params` is opaque to everyone but a KV connector.
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
    priority: int = 0
    deadline_s: float | None = None
    kv_retention: KvCacheRetentionConfig | None = None
    logits: tuple[LogitsKind, ...] = ()
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
    ) -> Request:
        """Check everything against `limits` and resolve what is unset.

        `default_seed` seeds a request that brings none; the caller varies it per request. With neither, the
        seed is fresh randomness. `arrival_s` is on the monotonic clock; a time-out counts from it. Raises
        RequestError.
        """
        if not isinstance(cast(object, params), SamplingParams):
            raise _refused("params", f"must be a SamplingParams, not {_shown(params)}")
        _check_text(request_id, "request_id", MAX_REQUEST_ID_LENGTH)
        if prompt is not None and prompt != "":
            _check_text(prompt, "prompt", None)
        _check_served(params)
        ids = _prompt_ids(prompt_token_ids, limits)
        max_tokens = _max_tokens(params.max_tokens, len(ids), limits)
        stop_ids = _stop_token_ids(params, limits)
        seed = default_seed if params.seed is None else params.seed
        if seed is None:
            seed = secrets.randbits(64)
        arrival_s = time.monotonic() if arrival_s is None else arrival_s
        options = options or RequestOptions()
        return cls(
            request_id=request_id,
            prompt_token_ids=ids,
            prompt=prompt,
            params=params,
            sampling=_row_sampling(params, limits, max_tokens, stop_ids),
            max_tokens=max_tokens,
            stop_token_ids=stop_ids,
            stop=_stop_strings(params, limits),
            seed=_integer(seed, "seed", SEED_MIN, SEED_MAX) % 2**64,
            sample_idx=0,
            num_samples=_integer(params.n, "n", 1, limits.max_n),
            cache_salt=_cache_salt(params.cache_salt, limits),
            arrival_s=arrival_s,
            priority=_integer(params.priority, "priority", MIN_PRIORITY, MAX_PRIORITY, "lower is earlier"),
            deadline_s=_deadline(options.timeout_s, arrival_s),
            kv_retention=_kv_retention(options.kv_retention),
        )

    def samples(self) -> list[Request]:
        """Return the n requests this one stands for; they share the prompt list and the seed."""
        if self.num_samples == 1:
            return [self]
        return [dataclasses.replace(self, sample_idx=i, num_samples=1) for i in range(self.num_samples)]


def _row_sampling(
    params: SamplingParams, limits: Limits, max_tokens: int, stop_ids: frozenset[int]
) -> RowSampling:
    """Resolve what a row carries. A greedy row carries no filters: they never remove the likeliest token."""
    temperature = _temperature(params, limits)
    top_k = (
        0 if params.top_k is None else _integer(params.top_k, "top_k", -1, MAX_TOP_K, "-1 or 0 turn it off")
    )
    top_p = 1.0 if params.top_p is None else _number(params.top_p, "top_p", 0.0, 1.0, "1 turns it off")
    if top_p == 0.0:
        raise _refused("top_p", "must be above 0 and at most 1, not 0; use temperature=0 for greedy")
    min_p = 0.0 if params.min_p is None else _number(params.min_p, "min_p", 0.0, 1.0, "0 turns it off")
    bound = limits.max_penalty
    min_tokens = _integer(
        params.min_tokens, "min_tokens", 0, max_tokens, f"it may not exceed max_tokens ({max_tokens})"
    )
    is_greedy = temperature == 0.0
    return RowSampling(
        temperature=temperature,
        top_k=0 if is_greedy or top_k < 0 or top_k >= limits.vocab_size else top_k,
        top_p=1.0 if is_greedy else top_p,
        min_p=0.0 if is_greedy else min_p,
        repetition_penalty=_number(
            params.repetition_penalty, "repetition_penalty", 1 / bound, bound, "1 turns it off"
        ),
        presence_penalty=_number(
            params.presence_penalty, "presence_penalty", -bound, bound, "0 turns it off"
        ),
        frequency_penalty=_number(
            params.frequency_penalty, "frequency_penalty", -bound, bound, "0 turns it off"
        ),
        logit_bias=_logit_bias(params.logit_bias, limits),
        min_tokens=min_tokens,
        stop_ids=tuple(sorted(stop_ids)) if min_tokens else (),
        logprobs=_logprobs(params.logprobs, limits),
    )


def _temperature(params: SamplingParams, limits: Limits) -> float:
    """Unset is greedy, or 1.0 once top_p or top_k is set. Tiny values are refused, not rounded to greedy."""
    if params.temperature is None:
        return 0.0 if params.top_p is None and params.top_k is None else 1.0
    low, high = limits.min_temperature, limits.max_temperature
    value = _number(params.temperature, "temperature", 0.0, high, "use 0 for greedy")
    if 0.0 < value < low:
        what = f"must be 0 or from {low:g} to {high:g}, not {_shown(value)}; use 0 for greedy"
        raise _refused("temperature", what)
    return value


def _logprobs(given: int | None, limits: Limits) -> int:
    if given is None:
        return -1
    return _integer(given, "logprobs", 0, min(limits.max_logprobs, limits.vocab_size))


def _prompt_ids(given: Sequence[int], limits: Limits) -> list[int]:
    ids = _listed(given, "prompt_token_ids", limits.max_seq_len - 1, "max_seq_len - 1", _context_error)
    if not ids:
        raise _refused("prompt_token_ids", "is empty; give at least one token")
    return _checked_ids(ids, limits, "prompt_token_ids")


def _max_tokens(given: int | None, num_prompt: int, limits: Limits) -> int:
    room = limits.max_seq_len - num_prompt
    if given is None:
        return room
    value = _integer(given, "max_tokens", 1, None, "leave it None to fill the context")
    if value > room:
        raise _context_error(
            "max_tokens",
            f"is {_shown(value)} after a prompt of {num_prompt} tokens, and the two together may not exceed "
            f"{limits.max_seq_len}; shorten the prompt or ask for at most {room}",
        )
    return value


def _stop_token_ids(params: SamplingParams, limits: Limits) -> frozenset[int]:
    """The user's ids and the model's. An EOS id beyond the embedding can never be sampled and is left out."""
    eos = () if params.ignore_eos else (i for i in limits.eos_token_ids if 0 <= i < limits.vocab_size)
    if params.stop_token_ids is None:
        return frozenset(eos)
    ids = _listed(params.stop_token_ids, "stop_token_ids", limits.max_token_list, "the cap")
    return frozenset(eos).union(_checked_ids(ids, limits, "stop_token_ids"))


def _stop_strings(params: SamplingParams, limits: Limits) -> tuple[str, ...]:
    if params.stop is None:
        return ()
    given = [params.stop] if isinstance(params.stop, str) else params.stop
    strings = _listed(given, "stop", limits.max_stop_strings, "the cap")
    for i, text in enumerate(strings):
        _check_text(text, f"stop[{i}]", limits.max_stop_length)
    if strings and not params.detokenize:
        raise _refused("stop", "needs text, and detokenize=False makes none; use stop_token_ids instead")
    return tuple(strings)


def _logit_bias(given: Mapping[int, float] | None, limits: Limits) -> tuple[tuple[int, float], ...]:
    if given is None:
        return ()
    if not isinstance(cast(object, given), Mapping):
        raise _refused("logit_bias", f"must map token ids to numbers, not be {_shown(given)}")
    if len(given) > limits.max_token_list:
        raise _refused("logit_bias", f"has {len(given)} entries, at most {limits.max_token_list} are allowed")
    bias: dict[int, float] = {}
    for key, value in given.items():
        token_id = _integer(key, "logit_bias[key]", 0, limits.vocab_size - 1, "keys are token ids")
        bound = limits.max_logit_bias
        bias[token_id] = _number(value, f"logit_bias[{token_id}]", -bound, bound)
    return tuple(sorted(bias.items()))


def _deadline(given: float | None, arrival_s: float) -> float | None:
    if given is None:
        return None
    value = _number(given, "timeout_s", 0.0, MAX_TIMEOUT_S, "leave it None for no time-out")
    if value == 0.0:
        raise _refused("timeout_s", "must be above 0 seconds, not 0; leave it None for no time-out")
    return arrival_s + value


def _kv_retention(given: KvCacheRetentionConfig | None) -> KvCacheRetentionConfig | None:
    if given is not None and not isinstance(cast(object, given), KvCacheRetentionConfig):
        raise _refused("kv_cache_retention_config", f"must be a KvCacheRetentionConfig, not {_shown(given)}")
    return given


def _cache_salt(given: str | None, limits: Limits) -> str | None:
    if given is None:
        return None
    _check_text(given, "cache_salt", limits.max_salt_length)
    if not SALT_PATTERN.fullmatch(given):
        raise _refused("cache_salt", "may hold printable ASCII without spaces only; encode it, e.g. as hex")
    return given


def _check_served(params: SamplingParams) -> None:
    for name, unset in UNSERVED.items():
        value = getattr(params, name)
        if value is unset:
            continue
        raise RequestError(
            f"{name}={_shown(value)} is not served by this version; leave it unset ({unset!r}).",
            param=name,
            code="unsupported",
        )
    for name in FLAGS:
        if not isinstance(getattr(params, name), bool):
            raise _refused(name, f"must be True or False, not {_shown(getattr(params, name))}")


def _listed(
    given: Any,
    param: str,
    cap: int,
    cap_name: str,
    error: Callable[[str, str], RequestError] | None = None,
) -> list[Any]:
    """Copy a bounded list, tuple, set or array; the bound is checked before anything is read."""
    is_array = hasattr(given, "tolist") and getattr(given, "ndim", 1) == 1
    if not is_array and not isinstance(given, list | tuple | set | frozenset):
        raise _refused(param, f"must be a list, not {_shown(given)}")
    values = cast(Any, given)
    size = len(values)
    if size > cap:
        what = f"has {size} entries, at most {cap} ({cap_name}) are allowed; shorten it"
        raise (error or _refused)(param, what)
    return list(values.tolist() if is_array else values)


def _checked_ids(ids: list[Any], limits: Limits, param: str) -> list[int]:
    """Check types and range at C speed; look for the offender only where there is one."""
    if not ids:
        return ids
    types = set(map(type, ids))
    if types == {int} and min(ids) >= 0 and max(ids) < limits.vocab_size:
        return ids
    hint = f"ids are below the vocabulary of {limits.vocab_size}"
    return [_integer(t, f"{param}[{i}]", 0, limits.vocab_size - 1, hint) for i, t in enumerate(ids)]


def _integer(given: Any, param: str, low: int, high: int | None, hint: str = "") -> int:
    allowed = f"from {low} to {high}" if high is not None else f"of at least {low}"
    is_integer = not isinstance(given, bool) and isinstance(given, numbers.Integral)
    value = cast(int, given)
    if not is_integer or value < low or (high is not None and value > high):
        raise _refused(param, f"must be an integer {allowed}, not {_shown(given)}{hint and '; '}{hint}")
    return int(value)


def _number(given: Any, param: str, low: float, high: float, hint: str = "") -> float:
    is_number = not isinstance(given, bool) and isinstance(given, numbers.Real)
    value = cast(float, given)
    # NaN fails the comparison, and so does an integer too large for a float.
    if not is_number or not low <= value <= high:
        raise _refused(
            param, f"must be a number from {low:g} to {high:g}, not {_shown(given)}{hint and '; '}{hint}"
        )
    return float(value)


def _check_text(given: Any, param: str, cap: int | None) -> None:
    if not isinstance(given, str) or not given:
        raise _refused(param, f"must be a non-empty string, not {_shown(given)}")
    if cap is not None and len(given) > cap:
        raise _refused(param, f"has {len(given)} characters, at most {cap} are allowed; shorten it")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise _refused(
            param, f"has a lone surrogate at character {error.start}; send well-formed Unicode"
        ) from None


def _refused(param: str, what: str) -> RequestError:
    return RequestError(f"{param} {what}.", param=param.partition("[")[0])


def _context_error(param: str, what: str) -> RequestError:
    return RequestError(f"{param} {what}.", param=param, code="context_length_exceeded")


def _shown(value: object) -> str:
    """Name a hostile value in bounded space: never a whole list, a long string or a million digits."""
    if isinstance(value, str):
        return repr(value[:40]) + ("..." if len(value) > 40 else "")
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, numbers.Integral):
        digits = int(value)
        is_short = digits.bit_length() <= 128
        return repr(digits) if is_short else f"an integer of {digits.bit_length()} bits"
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        return repr(float(value))
    return f"a {type(value).__name__}"
