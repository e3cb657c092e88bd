"""Is `/v1/completions` what OpenAI's clients expect? Prompts, choices, echo, log-probabilities, usage."""

from __future__ import annotations

import dataclasses
import queue
from typing import Any

import pytest

from slipstream.core.sampling_params import SamplingParams
from tests.engine.tiny import prompt_ids
from tests.serve.sse_protocol import joined_text
from tests.serve.tiny_server import MODEL, RunningServer

PATH = "/v1/completions"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 6}


def text_of(server: RunningServer, prompt: Any, **body: Any) -> str:
    return server.ok(PATH, prompt=prompt, **{**GREEDY, **body})["choices"][0]["text"]


def test_an_answer_has_the_fields_clients_read(tiny: RunningServer) -> None:
    answer = tiny.ok(PATH, model=MODEL, prompt="ba de", **GREEDY)
    assert answer["object"] == "text_completion" and answer["model"] == MODEL
    assert answer["id"].startswith("cmpl-") and isinstance(answer["created"], int)
    [choice] = answer["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "length" and choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 3 and usage["completion_tokens"] == 6 and usage["total_tokens"] == 9
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0


def test_every_form_of_prompt_is_taken(tiny: RunningServer) -> None:
    ids = tiny.ok("/tokenize", prompt="ba de")["tokens"]
    text = text_of(tiny, "ba de")
    assert text and text_of(tiny, ids) == text == text_of(tiny, [ids]) == text_of(tiny, ["ba de"])
    assert text_of(tiny, None, prompt_token_ids=ids) == text
    both = tiny.ok(PATH, prompt=["ba de", "fi"], **GREEDY)["choices"]
    assert [choice["index"] for choice in both] == [0, 1]
    assert [choice["text"] for choice in both] == [text, text_of(tiny, "fi")]


def test_max_tokens_is_16_or_what_fits_where_nothing_is_said(tiny: RunningServer) -> None:
    plain = {"temperature": 0, "ignore_eos": True}
    assert tiny.ok(PATH, prompt="ba", **plain)["usage"]["completion_tokens"] == 16
    long = prompt_ids(250, seed=1)
    assert tiny.ok(PATH, prompt=long, **plain)["usage"]["completion_tokens"] == 6


def test_samples_of_n_are_numbered_through_all_prompts(tiny: RunningServer) -> None:
    body = {"prompt": ["ba", "de"], "n": 3, "seed": 7, "max_tokens": 8, "ignore_eos": True}
    choices = tiny.ok(PATH, **body)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert len({choice["text"] for choice in choices}) > 2
    again = tiny.ok(PATH, **body)["choices"]
    assert [choice["text"] for choice in again] == [choice["text"] for choice in choices]


def test_without_a_temperature_answers_are_drawn(tiny: RunningServer) -> None:
    choices = tiny.ok(PATH, prompt="ba", n=8, max_tokens=12)["choices"]
    assert len({choice["text"] for choice in choices}) > 1


def test_the_best_of_many_are_returned(tiny: RunningServer) -> None:
    body = {"prompt": "ba", "seed": 3, "max_tokens": 6, "ignore_eos": True, "logprobs": 0, "temperature": 3.0}
    many = tiny.ok(PATH, n=5, **body)["choices"]
    best = tiny.ok(PATH, n=2, best_of=5, **body)
    sums = sorted((sum(c["logprobs"]["token_logprobs"]) for c in many), reverse=True)
    shown = [sum(choice["logprobs"]["token_logprobs"]) for choice in best["choices"]]
    assert shown == pytest.approx(sums[:2], abs=1e-4) and [c["index"] for c in best["choices"]] == [0, 1]
    chunks = tiny.events(PATH, n=2, best_of=5, **body)
    assert [joined_text(chunks, i) for i in range(2)] == [choice["text"] for choice in best["choices"]]


def test_beams_are_returned_best_first(tiny: RunningServer) -> None:
    body = {"prompt": "ba", "use_beam_search": True, "n": 2, "beam_width": 3, "max_tokens": 5}
    choices = tiny.ok(PATH, **body)["choices"]
    request = tiny.service.prompts.encode("ba")
    assert len(choices) == 2 and choices[0]["text"] != choices[1]["text"] and request.token_ids
    assert "use_beam_search" in tiny.refusal(PATH, stream=True, **body)["message"]


def test_an_echo_comes_before_the_text(tiny: RunningServer) -> None:
    plain = text_of(tiny, "ba de")
    assert text_of(tiny, "ba de", echo=True) == "ba de" + plain
    ids = tiny.ok("/tokenize", prompt="ba de")["tokens"]
    assert text_of(tiny, ids, echo=True) == "ba de" + plain
    assert text_of(tiny, ids, echo=True, truncate_prompt_tokens=1).startswith("de")
    chunks = tiny.events(PATH, prompt=["ba de", "fi"], echo=True, n=2, **GREEDY)
    assert [joined_text(chunks, i) for i in range(2)] == ["ba de" + plain] * 2
    assert joined_text(chunks, 3) == "fi" + text_of(tiny, "fi")


def test_logprobs_follow_the_tokens(tiny: RunningServer) -> None:
    choice = tiny.ok(PATH, prompt="ba de", logprobs=2, **GREEDY)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    places = zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
    assert all(choice["text"][start:].startswith(token) for start, token in places)
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert value <= 0 and 1 <= len(top) <= 3
        # Greedy: the token that stands there is the likeliest.
        assert max(top, key=top.__getitem__) == token and top[token] == value


def test_echoed_logprobs_speak_of_the_prompt_too(tiny: RunningServer) -> None:
    choice = tiny.ok(PATH, prompt="ba de", logprobs=1, echo=True, **GREEDY)["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == 3 + 6 and "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"][:3] == [0, 2, 3]
    chunks = tiny.events(PATH, prompt="ba de", logprobs=1, echo=True, **GREEDY)
    streamed = [part for chunk in chunks if (part := chunk["choices"][0]["logprobs"])]
    for name in ("tokens", "text_offset"):
        assert [value for part in streamed for value in part[name]] == logprobs[name]
    values = [value for part in streamed for value in part["token_logprobs"]]
    assert values == pytest.approx(logprobs["token_logprobs"], abs=1e-4)
    tops = [top for part in streamed for top in part["top_logprobs"]]
    assert [list(top or ()) for top in tops] == [list(top or ()) for top in logprobs["top_logprobs"]]


def test_prompt_logprobs_name_tokens_by_id(tiny: RunningServer) -> None:
    choice = tiny.ok(PATH, prompt="ba de", prompt_logprobs=1, **GREEDY)["choices"][0]
    first, second, third = choice["prompt_logprobs"]
    ids = tiny.ok("/tokenize", prompt="ba de")["tokens"]
    assert first is None and str(ids[1]) in second and str(ids[2]) in third
    assert set(third[str(ids[2])]) == {"logprob", "rank", "decoded_token"}
    assert third[str(ids[2])]["decoded_token"] == "de"
    assert "stream" in tiny.refusal(PATH, prompt="ba", prompt_logprobs=1, stream=True)["message"]


def test_ids_are_returned_on_request(tiny: RunningServer) -> None:
    choice = tiny.ok(PATH, prompt="ba de", return_token_ids=True, **GREEDY)["choices"][0]
    assert choice["prompt_token_ids"] == tiny.ok("/tokenize", prompt="ba de")["tokens"]
    assert tiny.ok("/detokenize", tokens=choice["token_ids"])["prompt"] == choice["text"]
    chunks = tiny.events(PATH, prompt="ba de", return_token_ids=True, **GREEDY)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [token for c in choices for token in c.get("token_ids", [])] == choice["token_ids"]
    assert choices[0]["prompt_token_ids"] == choice["prompt_token_ids"]
    body = {"prompt": "ba de", "return_tokens_as_token_ids": True, "logprobs": 1}
    named = tiny.ok(PATH, **body, **GREEDY)["choices"][0]["logprobs"]["tokens"]
    assert named == [f"token_id:{token}" for token in choice["token_ids"]]


def test_a_stop_ends_the_text_and_is_named(tiny: RunningServer) -> None:
    text = text_of(tiny, "ba de", max_tokens=12)
    stop = text[4:7]
    choice = tiny.ok(PATH, prompt="ba de", stop=[stop, "zzz"], **{**GREEDY, "max_tokens": 12})["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == stop
    kept = text_of(tiny, "ba de", stop=stop, include_stop_str_in_output=True, max_tokens=12)
    assert kept == choice["text"] + stop


def test_usage_counts_what_was_cached(tiny: RunningServer) -> None:
    prompt = prompt_ids(100, seed=77)
    first = tiny.ok(PATH, prompt=prompt, **GREEDY)["usage"]
    second = tiny.ok(PATH, prompt=prompt, **GREEDY)["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] >= 64
    salted = tiny.ok(PATH, prompt=prompt, cache_salt="other", **GREEDY)["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


def test_running_usage_grows_with_the_stream(tiny: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = tiny.events(PATH, prompt="ba de", stream_options=options, **GREEDY)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] >= 1 and counts == sorted(counts) and counts[-1] == 6
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {3}


@pytest.mark.parametrize(
    ("field", "value", "changes"),
    [
        ("logit_bias", {"265": 100.0}, SamplingParams(logit_bias={265: 100.0})),
        ("top_k", 1, SamplingParams(top_k=1, temperature=1.0)),
        ("repetition_penalty", 1.9, SamplingParams(repetition_penalty=1.9)),
        ("presence_penalty", 1.9, SamplingParams(presence_penalty=1.9)),
        ("frequency_penalty", 1.9, SamplingParams(frequency_penalty=1.9)),
        ("allowed_token_ids", [265, 276], SamplingParams(allowed_token_ids=[265, 276])),
        ("bad_words", ["S"], SamplingParams(bad=["S"])),
        ("no_repeat_ngram_size", 1, SamplingParams(no_repeat_ngram_size=1)),
        ("min_tokens", 4, SamplingParams(min_tokens=4)),
        ("stop_token_ids", [265], SamplingParams(stop_token_ids=[265])),
    ],
)
def test_an_extra_reaches_the_sampler(
    tiny: RunningServer, field: str, value: Any, changes: SamplingParams
) -> None:
    """What an HTTP field does is what the Python parameter does."""
    plain = dataclasses.asdict(SamplingParams())
    given = {name: v for name, v in dataclasses.asdict(changes).items() if v != plain[name]}
    params = SamplingParams(**{"max_tokens": 6, "temperature": 0.0, **given})
    outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    request = tiny.service.create_request(tiny.service.prompts.encode("ba de"), params)
    tiny.service.submit(request, outputs.put)
    expected = outputs.get(timeout=30).outputs[0].text
    temperature = 1.0 if field == "top_k" else 0
    answer = tiny.ok(PATH, prompt="ba de", max_tokens=6, temperature=temperature, **{field: value})
    assert answer["choices"][0]["text"] == expected
