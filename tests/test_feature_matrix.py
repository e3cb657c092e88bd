"""Does every pair of options work together, or is it refused with a sentence that names one of the two?

Each option has one representative value. Options of a request (sampling, and what a call takes) are paired
with each other in one engine; options of an engine (scheduling, cache) with every option of a request, and
with each other. A run must give the right number of tokens, keep what each option promises, and wherever the
other option may not change tokens, give exactly those of the one alone: greedy or drawn from a seed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, KvCacheConfig, KvCacheRetentionConfig, SamplingParams, SchedulerConfig
from slipstream.core.errors import ConfigError, RequestError, UnsupportedError
from slipstream.core.outputs import CompletionOutput, RequestOutput
from tests.engine.tiny import (
    FIRST_BYTE,
    VOCAB,
    byte_tokenizer,
    prompt_ids,
    tiny_gemma3,
    tiny_llama,
    write_folder,
)

MAX_TOKENS = 6
MIN_TOKENS = 4
PREFIX = prompt_ids(36, seed=1)
PROMPTS = ([*PREFIX, *prompt_ids(5, seed=2)], [*PREFIX, *prompt_ids(3, seed=3)])
LONGEST = max(map(len, PROMPTS)) + MAX_TOKENS
ALLOWED = list(range(FIRST_BYTE + 40, VOCAB, 2))
BANNED = FIRST_BYTE + 50
# What the two models write after one of the prompts, so that it ends there; over a token's border.
STOPS = ["v o", "fafa"]
# The logits of a tiny model are so loud that a lower temperature leaves nothing to chance.
SEEDED = {"temperature": 20.0, "seed": 5}

Promise = Callable[[RequestOutput], bool]


def nothing_more(output: RequestOutput) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Option:
    """One option with its value.

    `sampling` and `call` are of a request; `engine`, `kv` and `scheduler` of the engine. `changes` tells
    whether it may change tokens; `promise` what every output of it keeps. `word` stands in a refusal.
    """

    name: str
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kv: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scheduler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changes: bool = False
    promise: Promise = nothing_more

    @property
    def keys(self) -> dict[str, Any]:
        return {**self.sampling, **self.call, **self.engine, **self.kv, **self.scheduler}


def each_sample(test: Callable[[list[int]], bool]) -> Promise:
    return lambda output: all(test(sample.token_ids) for sample in output.outputs)


def has_stopped(sample: CompletionOutput) -> bool:
    """Tell whether no stop string was passed over; where one was wanted in the text, it ends the text.

    Beside min_tokens, one that is complete within so many tokens stays in the text.
    """
    cut = any(sample.text.endswith(stop) for stop in STOPS)
    early = len(byte_tokenizer().decode(sample.token_ids[:MIN_TOKENS])) if is_long_enough(sample) else 0
    passed = any(stop in sample.text[max(0, early - len(stop) + 1) :] for stop in STOPS)
    return not passed or (cut and sample.stop_reason in STOPS)


def is_long_enough(sample: CompletionOutput) -> bool:
    return len(sample.token_ids) >= MIN_TOKENS


def has_no_repeated_pair(output: RequestOutput) -> bool:
    for sample in output.outputs:
        ids = [*output.prompt_token_ids, *sample.token_ids]
        pairs = list(itertools.pairwise(ids))
        new = pairs[len(output.prompt_token_ids) - 1 :]
        if any(pair in pairs[: len(pairs) - len(new) + i] for i, pair in enumerate(new)):
            return False
    return True


def is_a_search(output: RequestOutput) -> bool:
    """Best first; with the default length penalty the mean log-probability decides."""
    means = [(sample.cumulative_logprob or 0.0) / len(sample.token_ids) for sample in output.outputs]
    return all(mean < 0.0 for mean in means) and means == sorted(means, reverse=True)


def has_logprobs(output: RequestOutput) -> bool:
    return all(len(sample.logprobs or []) == len(sample.token_ids) for sample in output.outputs)


def has_prompt_logprobs(output: RequestOutput) -> bool:
    return len(output.prompt_logprobs or []) == len(output.prompt_token_ids)


def has_context_logits(output: RequestOutput) -> bool:
    return tuple(output.context_logits.shape) == (len(output.prompt_token_ids), VOCAB)


def has_generation_logits(output: RequestOutput) -> bool:
    return all(
        tuple(sample.generation_logits.shape) == (len(sample.token_ids), VOCAB) for sample in output.outputs
    )


def ban(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone()
    logits[BANNED] = -torch.inf
    return logits


def request_option(name: str, value: Any, promise: Promise = nothing_more, **more: Any) -> Option:
    return Option(name, sampling={name: value} | more, changes=True, promise=promise)


def neutral(name: str, value: Any, promise: Promise = nothing_more) -> Option:
    return Option(name, sampling={name: value}, promise=promise)


REQUEST_OPTIONS = [
    Option("plain"),
    request_option("temperature", 20.0, seed=5),
    request_option("top_p", 0.8, **SEEDED),
    request_option("top_k", 20, **SEEDED),
    request_option("min_p", 0.05, **SEEDED),
    request_option("n", 2, lambda output: len(output.outputs) == 2),
    request_option("repetition_penalty", 1.3),
    request_option("presence_penalty", 20.0),
    request_option("frequency_penalty", 20.0),
    request_option("logit_bias", {FIRST_BYTE + 60: 60.0}),
    request_option("min_tokens", MIN_TOKENS, lambda output: all(map(is_long_enough, output.outputs))),
    request_option("stop_token_ids", ALLOWED[::3]),
    request_option("stop", STOPS, lambda output: all(has_stopped(sample) for sample in output.outputs)),
    request_option("bad_token_ids", [BANNED], each_sample(lambda ids: BANNED not in ids)),
    request_option("bad", ["ba"]),
    request_option("allowed_token_ids", ALLOWED, each_sample(lambda ids: set(ids) <= set(ALLOWED))),
    request_option("no_repeat_ngram_size", 2, has_no_repeated_pair),
    request_option("logits_processor", ban, each_sample(lambda ids: BANNED not in ids)),
    request_option("truncate_prompt_tokens", 20, lambda output: len(output.prompt_token_ids) == 20),
    request_option("best_of", 2),
    request_option("use_beam_search", True, is_a_search, beam_width=2),
    request_option("guided_decoding", {"regex": "[ab]+"}),
    neutral("logprobs", 2, has_logprobs),
    neutral("prompt_logprobs", 2, has_prompt_logprobs),
    neutral("return_context_logits", True, has_context_logits),
    neutral("return_generation_logits", True, has_generation_logits),
    neutral("detokenize", False, lambda output: all(sample.text == "" for sample in output.outputs)),
    neutral("skip_special_tokens", False),
    neutral("include_stop_str_in_output", True),
    neutral("cache_salt", "tenant"),
    neutral("priority", -3),
    Option("streaming", call={"streaming": True}),
    Option("timeout_s", call={"timeout_s": 600.0}),
    Option(
        "kv_cache_retention_config",
        call={"kv_cache_retention_config": KvCacheRetentionConfig(decode_retention_priority=80)},
    ),
]

ENGINE_OPTIONS = [
    Option("max_num_tokens", engine={"max_num_tokens": 13, "max_batch_size": 9}),
    Option("max_batch_size", engine={"max_batch_size": 2}),
    Option("enable_chunked_prefill", engine={"enable_chunked_prefill": False, "max_num_tokens": LONGEST}),
    Option("disable_overlap_scheduler", engine={"disable_overlap_scheduler": False}),
    Option("max_seq_len", engine={"max_seq_len": LONGEST + 4}),
    Option("stream_interval", engine={"stream_interval": 4}),
    Option("seed", engine={"seed": 3}),
    Option("enforce_eager", engine={"enforce_eager": True}),
    Option("batch_invariant", engine={"batch_invariant": True}),
    Option("tensor_parallel_size", engine={"tensor_parallel_size": 2}),
    Option("speculative_config", engine={"speculative_config": {"method": "ngram"}}),
    Option("quant_config", engine={"quant_config": {"quant_algo": "FP8"}}),
    Option("enable_lora", engine={"enable_lora": True}),
    Option("GUARANTEED_NO_EVICT", scheduler={"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"}),
    Option("STATIC_BATCH", scheduler={"capacity_scheduler_policy": "STATIC_BATCH"}),
    Option("EQUAL_PROGRESS", scheduler={"context_chunking_policy": "EQUAL_PROGRESS"}),
    Option("max_decode_stretch", scheduler={"max_decode_stretch": 2.0}),
    Option("dynamic_batch_config", scheduler={"dynamic_batch_config": {}}),
    Option("enable_block_reuse", kv={"enable_block_reuse": False}),
    Option("enable_partial_reuse", kv={"enable_partial_reuse": False}),
    Option("tokens_per_block", kv={"tokens_per_block": 8}),
    Option("max_tokens", kv={"max_tokens": 128}),
    Option("event_buffer_max_size", kv={"event_buffer_max_size": 64}),
    Option("max_gpu_total_bytes", kv={"max_gpu_total_bytes": "1MiB"}),
    Option("dtype", kv={"dtype": "fp8"}),
    Option("host_cache_size", kv={"host_cache_size": 1 << 20}),
    Option("max_attention_window", kv={"max_attention_window": [16]}),
    Option("copy_on_partial_reuse", kv={"copy_on_partial_reuse": False}),
]

# What need not be served yet. Once it is, it is held to everything else here, and leaves this set.
MAY_BE_REFUSED = {
    *("guided_decoding", "tensor_parallel_size"),
    *("speculative_config", "quant_config", "enable_lora", "dynamic_batch_config"),
    *("dtype", "host_cache_size", "max_attention_window", "copy_on_partial_reuse"),
}
# Pairs of served options that contradict each other, each refused with a sentence that names both.
CONTRADICTIONS = {
    frozenset({"stop", "detokenize"}),
    frozenset({"EQUAL_PROGRESS", "enable_chunked_prefill"}),
    frozenset({"max_decode_stretch", "enable_chunked_prefill"}),
    # A search ranks the model's own log-probabilities, and shows nothing before its end.
    *(
        frozenset({"use_beam_search", name})
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "best_of", "stop", "logits_processor", "streaming"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
        )
    ),
}
Outcome = list[RequestOutput] | Exception


def is_refusal(error: Exception) -> bool:
    return isinstance(error, UnsupportedError) or getattr(error, "code", "") == "unsupported"


def merged(options: tuple[Option, ...], part: str) -> dict[str, Any]:
    return {key: value for option in options for key, value in getattr(option, part).items()}


def clash(first: Option, second: Option) -> bool:
    """Tell whether two options are two values of one argument."""
    return any(first.keys[key] != second.keys[key] for key in first.keys.keys() & second.keys.keys())


def start(folder: Path, *options: Option) -> LLM:
    kv, scheduler = merged(options, "kv"), merged(options, "scheduler")
    return LLM(
        folder,
        kv_cache_config=KvCacheConfig(**kv),
        scheduler_config=SchedulerConfig(**scheduler),
        dtype="float32",
        **merged(options, "engine"),
    )


def submit(llm: LLM, options: tuple[Option, ...]) -> Any:
    """Start all prompts with these options; returns the generations, or why they were refused."""
    sampling = {"max_tokens": MAX_TOKENS, "ignore_eos": True, **merged(options, "sampling")}
    try:
        params = SamplingParams(**sampling)
        return [llm.generate_async(prompt, params, **merged(options, "call")) for prompt in PROMPTS]
    except (RequestError, ConfigError) as error:
        return error


def run_together(llm: LLM, combinations: list[tuple[Option, ...]]) -> list[Outcome]:
    """Run all combinations of request options in one engine, at the same time."""
    started = [submit(llm, options) for options in combinations]
    return [one if isinstance(one, Exception) else [g.result() for g in one] for one in started]


def tokens_of(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A tiny model, and what each option of a request gives alone in an engine of defaults."""

    folder: Path
    alone: dict[str, Outcome]

    def is_served(self, option: Option) -> bool:
        return not isinstance(self.alone.get(option.name), Exception)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(tiny_llama, id="llama"),
        pytest.param(tiny_gemma3, id="gemma3", marks=pytest.mark.slow),
    ],
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = write_folder(request.param(), tmp_path_factory.mktemp("model"))
    with start(folder) as llm:
        outcomes = run_together(llm, [(option,) for option in REQUEST_OPTIONS])
    return Subject(folder, {o.name: outcome for o, outcome in zip(REQUEST_OPTIONS, outcomes, strict=True)})


def complaints(subject: Subject, options: tuple[Option, ...], outcome: Outcome) -> list[str]:
    """Return what is wrong with the outcome of a combination of options."""
    names = " x ".join(option.name for option in options)
    if isinstance(outcome, Exception):
        return [] if is_rightly_refused(subject, options, outcome) else [f"{names}: {outcome!r}"]
    found = [f"{names}: {output.error!r}" for output in outcome if output.error is not None]
    if found:
        return found
    found += [f"{names}: breaks {o.name}" for o in options if not all(o.promise(out) for out in outcome)]
    samples = [(len(s.token_ids), s.finish_reason) for output in outcome for s in output.outputs]
    if not all(count == MAX_TOKENS if reason == "length" else reason == "stop" for count, reason in samples):
        found.append(f"{names}: ends as {samples}")
    changing = [option for option in options if option.changes]
    if len(changing) <= 1:
        expected = subject.alone[changing[0].name if changing else "plain"]
        if not isinstance(expected, Exception) and tokens_of(outcome) != tokens_of(expected):
            found.append(f"{names}: other tokens than {changing[0].name if changing else 'plain'} alone")
    return found


def is_rightly_refused(subject: Subject, options: tuple[Option, ...], error: Exception) -> bool:
    """Tell whether a refusal names what is not served, or two options that contradict each other."""
    names = {option.name for option in options}
    if any(pair <= names and all(name in str(error) for name in pair) for pair in CONTRADICTIONS):
        return True
    # A feature may come in several fields (use_beam_search has its beam_width).
    words = [word for o in options if o.name in MAY_BE_REFUSED for word in (o.name, *o.keys)]
    return is_refusal(error) and any(word in str(error) for word in words)


def test_request_options_alone(subject: Subject) -> None:
    wrong: list[str] = []
    for option in REQUEST_OPTIONS:
        wrong += complaints(subject, (option,), subject.alone[option.name])
    assert not wrong, "\n".join(wrong)


def test_the_comparison_means_something(subject: Subject) -> None:
    """Options that may change tokens do, or equal tokens would prove little."""
    plain = subject.alone["plain"]
    assert not isinstance(plain, Exception)
    served = [o for o in REQUEST_OPTIONS if o.changes and subject.is_served(o)]
    changed = [o.name for o in served if tokens_of(subject.alone[o.name]) != tokens_of(plain)]  # type: ignore[arg-type]
    assert len(changed) > len(served) / 2, changed
    assert {"temperature", "logit_bias", "allowed_token_ids", "truncate_prompt_tokens", "n"} <= set(changed)


@pytest.fixture(scope="module")
def pairs_together(subject: Subject) -> dict[frozenset[str], tuple[tuple[Option, ...], Outcome]]:
    pairs = [pair for pair in itertools.combinations(REQUEST_OPTIONS, 2) if not clash(*pair)]
    with start(subject.folder) as llm:
        outcomes = run_together(llm, pairs)
        assert llm.get_stats()["num_running"] == llm.get_stats()["num_waiting"] == 0
    named = zip(pairs, outcomes, strict=True)
    return {frozenset(o.name for o in pair): (pair, outcome) for pair, outcome in named}


@pytest.mark.parametrize("option", REQUEST_OPTIONS, ids=lambda option: option.name)
def test_a_request_option_with_every_other(
    subject: Subject, option: Option, pairs_together: dict[frozenset[str], tuple[tuple[Option, ...], Outcome]]
) -> None:
    mine = [found for names, found in pairs_together.items() if option.name in names]
    assert len(mine) > len(REQUEST_OPTIONS) / 2
    wrong = [what for pair, outcome in mine for what in complaints(subject, pair, outcome)]
    assert not wrong, "\n".join(wrong)


def engine_complaints(subject: Subject, options: tuple[Option, ...], asked: list[Option]) -> list[str]:
    try:
        llm = start(subject.folder, *options)
    except (ConfigError, RequestError) as error:
        return complaints(subject, options, error)
    with llm:
        outcomes = run_together(llm, [(option,) for option in asked])
        wrong: list[str] = []
        for option, outcome in zip(asked, outcomes, strict=True):
            wrong += complaints(subject, (*options, option), outcome)
        stats = llm.get_stats()
    if stats["num_running"] or stats["num_waiting"]:
        wrong.append(f"{' x '.join(o.name for o in options)}: requests are left: {stats}")
    return wrong


@pytest.mark.parametrize("option", ENGINE_OPTIONS, ids=lambda option: option.name)
def test_an_engine_option_with_every_request_option(subject: Subject, option: Option) -> None:
    wrong = engine_complaints(subject, (option,), REQUEST_OPTIONS)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("option", ENGINE_OPTIONS, ids=lambda option: option.name)
def test_an_engine_option_with_every_later_one(subject: Subject, option: Option) -> None:
    """With plain requests and drawn ones; a pair is run once."""
    asked = [o for o in REQUEST_OPTIONS if o.name in ("plain", "temperature")]
    wrong: list[str] = []
    for other in ENGINE_OPTIONS[ENGINE_OPTIONS.index(option) + 1 :]:
        if not clash(option, other):
            wrong += engine_complaints(subject, (option, other), asked)
    assert not wrong, "\n".join(wrong)


def test_complaints_are_seen(subject: Subject) -> None:
    """Each kind of fault, planted in a right outcome."""
    plain, drawn = REQUEST_OPTIONS[0], REQUEST_OPTIONS[1]
    right = subject.alone["plain"]
    assert not isinstance(right, Exception) and complaints(subject, (plain,), right) == []
    other = dataclasses.replace(right[0].outputs[0], token_ids=[BANNED] * MAX_TOKENS)
    wrong = [dataclasses.replace(right[0], outputs=[other]), *right[1:]]
    assert "other tokens" in complaints(subject, (plain,), wrong)[0]
    assert "breaks bad_token_ids" in complaints(subject, (option_named("bad_token_ids"), drawn), wrong)[0]
    short = dataclasses.replace(right[0].outputs[0], token_ids=[BANNED])
    wrong = [dataclasses.replace(right[0], outputs=[short]), *right[1:]]
    assert "ends as" in complaints(subject, (plain, drawn), wrong)[0]
    failed = [dataclasses.replace(right[0], error=RequestError("it broke")), *right[1:]]
    assert "it broke" in complaints(subject, (plain,), failed)[0]
    unserved = option_named("guided_decoding")
    named, unnamed = (RequestError(text, code="unsupported") for text in ("guided_decoding=1 is not", "no"))
    assert complaints(subject, (plain, unserved), named) == []
    assert complaints(subject, (plain, unserved), unnamed) and complaints(subject, (plain, drawn), named)


def option_named(name: str) -> Option:
    return next(option for option in REQUEST_OPTIONS if option.name == name)
