"""What may a body say about generation? The fields that completions and chat share, and what they mean.

Defaults are OpenAI's (temperature 1), overlaid by what the model's publisher recommends; what the request
says wins over both. Bounds are those of `Request.create`, which checks every value: here are only types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from slipstream.core.checks import integer, number, refused, shown
from slipstream.core.limits import Limits
from slipstream.core.request import RequestOptions
from slipstream.core.sampling_params import SamplingParams
from slipstream.serve.errors import ApiError
from slipstream.serve.requests.base import IdList, RequestBody, optional

TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
BIAS = {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}
Texts = Annotated[Any, optional(TEXTS)]
Bias = Annotated[Any, optional(BIAS)]
EarlyStopping = Annotated[Any, optional({"type": ["boolean", "integer", "string"]})]
MAX_TIMEOUT_S = 30 * 24 * 3600.0
MAX_BIAS_KEY = 20

# Fields that go into SamplingParams as they are.
PLAIN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "allowed_token_ids",
    "bad_token_ids",
    "use_beam_search",
    "beam_width",
    "length_penalty",
    "early_stopping",
    "priority",
    "cache_salt",
    "truncate_prompt_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "detokenize",
    "prompt_logprobs",
)
RANDOM_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class StreamOptions(RequestBody):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(RequestBody):
    """What every body that generates may hold. `user` is the client's own label; nothing depends on it."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Texts = None
    stop_token_ids: IdList = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Bias = None
    no_repeat_ngram_size: int | None = None
    allowed_token_ids: IdList = None
    bad_token_ids: IdList = None
    bad_words: Texts = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping = None
    priority: int | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: int | None = None
    prompt_token_ids: IdList = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    detokenize: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None
    timeout: float | None = None

    @property
    def num_samples(self) -> int:
        """How many samples of each prompt are generated; nonsense counts as one and is refused later."""
        return max(self.n or 1, self.best_of or 1, self.beam_width or 1, 1)

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check_stream(self) -> None:
        """Refuse options of a stream that is not asked for."""
        if self.stream_options is not None and not self.stream:
            message = "stream_options is given without stream=true; set stream, or leave it out."
            raise ApiError(400, message, param="stream_options", code="invalid_value")

    def to_params(
        self,
        limits: Limits,
        recommended: Mapping[str, float],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """Return the parameters; `max_tokens` None fills the context. Raises RequestError."""
        given: dict[str, Any] = {name: value for name in PLAIN if (value := getattr(self, name)) is not None}
        if not self.use_beam_search:
            given = {"temperature": 1.0, **_recommendation(recommended), **given}
        if prompt_logprobs is not None:
            given["prompt_logprobs"] = prompt_logprobs
        return SamplingParams(
            n=1 if self.n is None else self.n,
            best_of=self.best_of,
            bad=self.bad_words,
            logit_bias=bias_of(self.logit_bias, limits),
            max_tokens=max_tokens,
            logprobs=logprobs,
            **given,
        )

    def to_options(self, max_timeout_s: float | None) -> RequestOptions:
        return options_of(self.timeout, max_timeout_s)


def options_of(timeout: float | None, max_timeout_s: float | None) -> RequestOptions:
    """Return what bounds a request's life: its own time-out within the server's. Raises RequestError."""
    if timeout is None:
        return RequestOptions(timeout_s=max_timeout_s)
    timeout_s = number(timeout, "timeout", 0.0, max_timeout_s or MAX_TIMEOUT_S, "in seconds")
    if timeout_s == 0.0:
        raise refused("timeout", "must be above 0 seconds, not 0; leave it out for the server's own")
    return RequestOptions(timeout_s=timeout_s)


def _recommendation(recommended: Mapping[str, float]) -> dict[str, float]:
    return {
        name: int(value) if name == "top_k" else value
        for name, value in recommended.items()
        if name in RANDOM_NAMES
    }


def bias_of(given: Any, limits: Limits) -> dict[int, float] | None:
    """Return a bias by token id; JSON spells the ids as strings. Raises RequestError."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise refused("logit_bias", f"must be an object of token ids and numbers, not {shown(given)}")
    if len(given) > limits.max_token_list:
        raise refused("logit_bias", f"has {len(given)} entries, at most {limits.max_token_list} are allowed")
    bias: dict[int, float] = {}
    for key, value in given.items():
        is_id = key.isascii() and key.isdigit() and len(key) <= MAX_BIAS_KEY
        hint = "keys are token ids"
        token_id = integer(int(key) if is_id else key, "logit_bias[key]", 0, limits.vocab_size - 1, hint)
        bias[token_id] = value
    return bias
