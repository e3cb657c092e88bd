"""What may a user ask of sampling? The public `SamplingParams` and its serialisable core `RowSampling`.

Fields are checked in `Request.create`, not here: the bounds depend on the model, and one gate below every
entry point refuses the same things everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from slipstream.core.options import options


@options()
class SamplingParams:
    """How one request turns logits into tokens, and when it stops.

    Greedy while `temperature`, `top_p` and `top_k` are all None; otherwise an unset `temperature` is 1.0.
    `temperature=0` is greedy too. `max_tokens=None` fills the context. `seed=None` draws fresh randomness.
    `logprobs=k` returns the k most likely tokens of each position besides the sampled one, as raw
    log-softmax of the model's logits. `token_ids` of the output include the stop token that ended it, the
    text does not unless `include_stop_str_in_output`. Until there are `min_tokens` no stop token is sampled,
    and a stop string that is complete by then does not count. Requests wait in the order of (`priority`,
    arrival), lower first; where pages run out, the last in that order gives way.

    `best_of` above `n` generates that many samples and returns the n with the largest sum of
    log-probabilities, likeliest first; a stream then shows nothing before its end. `bad` are texts that must
    not be written: the last token that would complete one is masked, in the ways a tokenizer spells it alone
    and after a space. `no_repeat_ngram_size` counts prompt and output. `truncate_prompt_tokens=k` keeps the
    last k tokens of the prompt, -1 as many as leave room for `max_tokens`. `prompt_logprobs=k` is `logprobs`
    for the prompt; `return_context_logits` and `return_generation_logits` return float32 logits of every
    prompt and output position.

    `use_beam_search` keeps the `beam_width` (n unless set) likeliest outputs at every step and returns the
    best n, best first, with `cumulative_logprob`. They are ranked by that sum over length ** `length_penalty`
    (1.0 unless set); `early_stopping` (False unless set) is as in transformers, True, False or "never", or
    TensorRT-LLM's number. Masks of tokens apply; what would change log-probabilities is refused beside it,
    and so are stop strings and streaming.

    A logits processor is called with the model's logits of one position (float32, on the engine's device,
    before bias, penalties and masks) and the ids so far. How it is called follows from its parameters:
    `(token_ids, logits)` with the generated ids, or `(prompt_token_ids, token_ids, logits)`, and it returns
    logits of the same shape [V]; or `(req_id, logits, token_ids, stream_ptr, client_id)` with logits
    [1, 1, V] to change in place and [prompt and generated ids]. One that raises ends its request alone.
    """

    max_tokens: int | None = 32
    min_tokens: int = 0
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | int | str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    bad: str | Sequence[str] | None = None
    bad_token_ids: Sequence[int] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None
    guided_decoding: Any = None
    logits_processor: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None
    priority: int = 0
    cache_salt: str | None = None


class RowSampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The resolved, serialisable part of `SamplingParams` that a row carries on the device.

    `temperature` 0.0 means greedy; `top_k` 0, `top_p` 1.0 and `min_p` 0.0 mean off. While fewer than
    `min_tokens` tokens are generated, every id of `stop_ids` is masked. Nonempty `allowed_ids` mask all
    others; the last id of a bad sequence is masked where the output ends with those before it. `logprobs` and
    `prompt_logprobs` -1 mean none. `has_processors` says that callables beside the plan change the logits.
    `num_candidates` above 0 brings that many leading allowed tokens of each step, for a search over them.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    allowed_ids: tuple[int, ...] = ()
    bad_ids: tuple[int, ...] = ()
    bad_sequences: tuple[tuple[int, ...], ...] = ()
    no_repeat_ngram_size: int = 0
    logprobs: int = -1
    prompt_logprobs: int = -1
    has_processors: bool = False
    num_candidates: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def reads_history(self) -> bool:
        """Say whether the next token depends on the order of the tokens before it."""
        return bool(self.bad_sequences) or self.no_repeat_ngram_size > 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
