"""Is every bad body answered 4xx in the one shape, naming the field, with the engine untouched?

The tables are rows of the reliability list; each runs over every route that could meet its fault. After all
of them the engine still answers as before, and nothing is held.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream.serve.requests.base import UNSERVED_CHAT, UNSERVED_GENERATION
from slipstream.serve.requests.chat import ChatBody
from slipstream.serve.requests.completion import CompletionBody
from slipstream.serve.settings import ServeSettings
from tests.engine.tiny import VOCAB, prompt_ids
from tests.serve.tiny_server import RunningServer, checked_error

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
POST_ROUTES = (COMPLETIONS, CHAT, EMBEDDINGS, "/tokenize", "/detokenize")
GENERATING = (COMPLETIONS, CHAT)
HELLO = [{"role": "user", "content": "ba"}]
VALID: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "ba", "max_tokens": 2},
    CHAT: {"messages": HELLO, "max_tokens": 2},
    EMBEDDINGS: {"input": "ba"},
    "/tokenize": {"prompt": "ba"},
    "/detokenize": {"tokens": [70]},
}
CONTEXT = 256


@pytest.fixture(autouse=True, scope="module")
def canary(tiny: RunningServer) -> Iterator[None]:
    """After every table the same request is answered the same, and nothing is left behind."""
    body: dict[str, Any] = {"prompt": "ba de", "max_tokens": 8, "temperature": 0}
    before = tiny.ok(COMPLETIONS, **body)["choices"]
    yield
    tiny.wait_idle()
    assert tiny.ok(COMPLETIONS, **body)["choices"] == before


def send(server: RunningServer, path: str, data: bytes, content_type: str | None = "application/json") -> Any:
    headers = {} if content_type is None else {"Content-Type": content_type}
    return server.client.post(path, content=data, headers=headers)


@pytest.mark.parametrize("path", POST_ROUTES)
@pytest.mark.parametrize(
    "data",
    [b"", b"  ", b"{", b"[]", b'"text"', b"17", b"null", b"{'a': 1}", b'{"a": NaN}', b"\xff\xfe", b"\0"],
)
def test_r01_a_body_that_is_no_object_is_refused(tiny: RunningServer, path: str, data: bytes) -> None:
    answer = send(tiny, path, data)
    assert answer.status_code == 400 and checked_error(answer)["code"] == "invalid_json"


@pytest.mark.parametrize("path", POST_ROUTES)
@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"]
)
def test_r01_another_content_type_is_refused(tiny: RunningServer, path: str, kind: str | None) -> None:
    answer = send(tiny, path, b'{"prompt": "ba"}', kind)
    assert answer.status_code == 415 and "application/json" in checked_error(answer)["message"]


@pytest.mark.parametrize("path", POST_ROUTES)
@pytest.mark.parametrize(
    "data",
    [b'{"a":' + b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"[" * 50 + b"]" * 50 + b"}",
     b'{"max_tokens":' + b"1" * 1_000_000 + b"}", b'{"max_tokens":1e999}'],
    ids=["lists", "objects", "past-the-depth", "digits", "exponent"],
)  # fmt: skip
def test_r04_nesting_and_giant_numbers_are_refused_fast(tiny: RunningServer, path: str, data: bytes) -> None:
    started = time.monotonic()
    checked_error(answer := send(tiny, path, data))
    assert answer.status_code == 400
    # Catches a parser that walks or recurses: it takes milliseconds.
    assert time.monotonic() - started < 10.0


def test_r04_ordinary_nesting_passes(tiny: RunningServer) -> None:
    parts = [{"type": "text", "text": "ba"}] * 100
    assert tiny.ok(CHAT, messages=[{"role": "user", "content": parts}], max_tokens=1)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, EMBEDDINGS, "/tokenize"])
@pytest.mark.parametrize("text", [b'"\\ud800"', b'"ab\xed\xa0\x80"', b'"\xff"', b'"\\u0000"'])
def test_r05_broken_text_is_refused_or_answered(tiny: RunningServer, path: str, text: bytes) -> None:
    name = {CHAT: b"messages", EMBEDDINGS: b"input"}.get(path, b"prompt")
    value = b'[{"role":"user","content":' + text + b"}]" if path == CHAT else text
    answer = send(tiny, path, b'{"%b":%b}' % (name, value))
    assert answer.status_code == 400 or (text == b'"\\u0000"' and answer.status_code == 200)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=40))
def test_r05_any_text_is_answered(tiny: RunningServer, text: str) -> None:
    answer = tiny.post(COMPLETIONS, prompt=text, max_tokens=1, echo=True)
    assert answer.status_code == (200 if text else 400), answer.text
    if text:
        assert answer.json()["choices"][0]["text"].startswith(text)


def test_r05_a_megabyte_of_one_emoji_is_refused(tiny: RunningServer) -> None:
    assert tiny.refusal(COMPLETIONS, prompt="🦀" * 250_000)["code"] == "context_length_exceeded"


EMPTY: list[tuple[str, dict[str, Any]]] = [
    *((COMPLETIONS, {"prompt": value}) for value in ("", [], [[]], [""], ["ba", ""], [[5], []], None)),
    (COMPLETIONS, {}),
    (COMPLETIONS, {"prompt_token_ids": []}),
    *((EMBEDDINGS, {"input": value}) for value in ("", [], [[]], None)),
    *((CHAT, {"messages": value}) for value in ([], None, [{}], [None], [{"role": "user"}])),
    (CHAT, {"messages": [{"role": "user", "content": None}]}),
    (CHAT, {"messages": [{"role": "user", "content": []}]}),
    (CHAT, {"messages": [{"content": "ba"}]}),
    (CHAT, {}),
    ("/tokenize", {}),
    ("/tokenize", {"messages": []}),
    ("/detokenize", {}),
]


@pytest.mark.parametrize(("path", "body"), EMPTY)
def test_r06_nothing_to_answer_is_refused(tiny: RunningServer, path: str, body: dict[str, Any]) -> None:
    error = tiny.refusal(path, **body)
    assert error["param"] in ("prompt", "input", "messages", "prompt_token_ids", "tokens"), error


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31, 2**63, 2**64, 1.5, True, None, "5", [5], {}])
def test_r07_ids_outside_the_vocabulary_are_refused(tiny: RunningServer, bad: Any) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": [5, bad]}),
        (COMPLETIONS, {"prompt": [[5], [5, bad]]}),
        (COMPLETIONS, {"prompt_token_ids": [5, bad]}),
        (CHAT, {"prompt_token_ids": [5, bad]}),
        (EMBEDDINGS, {"input": [5, bad]}),
        ("/detokenize", {"tokens": [5, bad]}),
    ]
    for path, body in bodies:
        answer = tiny.post(path, **body)
        assert answer.status_code == 400 and checked_error(answer), (path, body)


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("field", ["n", "best_of", "beam_width"])
@pytest.mark.parametrize("value", [10**9, 2**63, 0, -1, True, 1.5, "2"])
def test_r08_sample_counts_are_bounded(tiny: RunningServer, path: str, field: str, value: Any) -> None:
    body = {**VALID[path], field: value}
    if field == "beam_width":
        body["use_beam_search"] = True
    assert tiny.refusal(path, **body)["param"] in (field, "n")


def test_r09_prompts_times_samples_are_bounded(tiny: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    cap = 16
    monkeypatch.setattr(tiny.context, "settings", ServeSettings(max_fan_out=cap))
    error = tiny.refusal(COMPLETIONS, prompt=["ba"] * 100_000)
    assert error["code"] == "fan_out_exceeded" and "100000" in error["message"]
    ids = [[70]] * (cap // 4)
    answer = tiny.ok(COMPLETIONS, prompt=ids, n=4, max_tokens=1, detokenize=False)
    assert len(answer["choices"]) == cap
    assert tiny.refusal(COMPLETIONS, prompt=[*ids, [70]], n=4)["code"] == "fan_out_exceeded"
    assert tiny.refusal(EMBEDDINGS, input=["ba"] * (cap + 1))["code"] == "fan_out_exceeded"


@pytest.mark.parametrize("value", [0, -1, 2**63, 1.5, True, "4"])
@pytest.mark.parametrize("path", GENERATING)
def test_r10_lengths_that_cannot_be_are_refused(tiny: RunningServer, path: str, value: Any) -> None:
    assert tiny.refusal(path, **{**VALID[path], "max_tokens": value})["param"] == "max_tokens"


def test_r10_prompt_and_answer_fit_the_context_together(tiny: RunningServer) -> None:
    prompt = prompt_ids(200, seed=5)
    assert tiny.ok(COMPLETIONS, prompt=prompt, max_tokens=56, ignore_eos=True)
    error = tiny.refusal(COMPLETIONS, prompt=prompt, max_tokens=57)
    assert error["code"] == "context_length_exceeded"
    assert "200" in error["message"] and "256" in error["message"]
    assert tiny.refusal(COMPLETIONS, prompt=prompt_ids(CONTEXT, seed=6))["code"] == "context_length_exceeded"
    assert tiny.ok(COMPLETIONS, prompt=prompt_ids(CONTEXT - 1, seed=6))["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("value", [-1, 65, 10**9, True, 1.5])
def test_r11_counts_of_logprobs_are_bounded(tiny: RunningServer, value: Any) -> None:
    assert tiny.refusal(COMPLETIONS, prompt="ba", logprobs=value)["param"] == "logprobs"
    assert tiny.refusal(COMPLETIONS, prompt="ba", prompt_logprobs=value)["param"] == "prompt_logprobs"
    error = tiny.refusal(CHAT, messages=HELLO, logprobs=True, top_logprobs=value)
    assert error["param"] in ("top_logprobs", "logprobs")
    assert tiny.refusal(CHAT, messages=HELLO, top_logprobs=2)["param"] == "top_logprobs"


def test_r11_logprobs_of_prompts_are_bounded_in_all(tiny: RunningServer) -> None:
    prompts = [prompt_ids(250, seed=i) for i in range(20)]
    error = tiny.refusal(COMPLETIONS, prompt=prompts, echo=True, logprobs=64)
    assert "log-probabilities" in error["message"] and error["param"] == "logprobs"
    assert tiny.ok(COMPLETIONS, prompt=prompts[:2], echo=True, logprobs=64, max_tokens=1)


MAPS: list[Any] = [
    {"320": 1.0}, {"-1": 1.0}, {"x": 1.0}, {"1e3": 1.0}, {"5": 101}, {"5": "1"}, {"5": None}, {"9" * 999: 1},
    {str(i): 1.0 for i in range(10_000)}, [1, 2], "5",
]  # fmt: skip


@pytest.mark.parametrize("value", MAPS, ids=range(len(MAPS)))
@pytest.mark.parametrize("path", GENERATING)
def test_r12_a_bias_that_cannot_be_is_refused(tiny: RunningServer, path: str, value: Any) -> None:
    error = tiny.refusal(path, **VALID[path], logit_bias=value)
    assert error["param"] == "logit_bias" and len(error["message"]) < 300


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "bad_token_ids"])
@pytest.mark.parametrize("value", [[VOCAB], [-1], [1.5], [True], ["5"], [5] * 1_000_000, 5, "5", {}])
def test_r12_lists_of_ids_are_checked(tiny: RunningServer, field: str, value: Any) -> None:
    assert tiny.refusal(COMPLETIONS, prompt="ba", **{field: value})["param"] == field


SAMPLING: list[tuple[str, Any]] = [
    ("temperature", -1), ("temperature", 1e-40), ("temperature", 1e9), ("temperature", "1"),
    ("temperature", True), ("temperature", [1]), ("top_p", 0), ("top_p", 1.5), ("top_p", -0.1),
    ("top_k", 2**31), ("top_k", -2), ("top_k", 1.5), ("min_p", -1), ("min_p", 2),
    ("repetition_penalty", 1e308), ("repetition_penalty", 0), ("presence_penalty", 1e308),
    ("frequency_penalty", -1e308), ("frequency_penalty", "0"), ("seed", 2**65), ("seed", 1.5),
    ("seed", "1"), ("min_tokens", -1), ("min_tokens", 3), ("no_repeat_ngram_size", -1),
    ("ignore_eos", 1), ("ignore_eos", "true"), ("priority", 2**40), ("cache_salt", "a b"),
    ("cache_salt", "x" * 999), ("cache_salt", 5), ("truncate_prompt_tokens", 0), ("length_penalty", 1.0),
    ("timeout", 0), ("timeout", -1), ("timeout", 1e99), ("stream", 1), ("stream", "true"),
    ("detokenize", "no"), ("skip_special_tokens", 0), ("user", 5), ("bad_words", [""]), ("bad_words", 5),
    ("stream_options", {"include_usage": True}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), SAMPLING)
@pytest.mark.parametrize("path", GENERATING)
def test_r13_sampling_out_of_bounds_is_refused(
    tiny: RunningServer, path: str, field: str, value: Any
) -> None:
    error = tiny.refusal(path, **{**VALID[path], field: value})
    aliases = {"bad_words": "bad"}
    assert error["param"] in (field, aliases.get(field)), error


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    body=st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.none())
            for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty",
                         "frequency_penalty", "seed", "n", "max_tokens", "min_tokens", "logprobs")
        },
    )
)  # fmt: skip
def test_r13_any_numbers_are_answered_or_refused(tiny: RunningServer, body: dict[str, Any]) -> None:
    answer = tiny.post(COMPLETIONS, prompt="ba", **body)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        checked_error(answer)


STOPS: list[Any] = ["", [""], ["a", ""], ["a"] * 10_000, "a" * (1 << 20), ["a", 5], 5, {"a": 1}]


@pytest.mark.parametrize("value", STOPS, ids=range(len(STOPS)))
@pytest.mark.parametrize("path", GENERATING)
def test_r14_stops_are_bounded(tiny: RunningServer, path: str, value: Any) -> None:
    error = tiny.refusal(path, **VALID[path], stop=value)
    assert error["param"] == "stop" and len(error["message"]) < 300


@pytest.mark.parametrize("name", ["gpt-4", "", "../tiny", "/etc/passwd", "tiny ", "TINY", "m" * 1_000_000])
@pytest.mark.parametrize("path", POST_ROUTES)
def test_r15_an_unknown_model_is_not_found(tiny: RunningServer, path: str, name: str) -> None:
    answer = tiny.post(path, model=name, **VALID[path])
    error = checked_error(answer)
    assert answer.status_code == 404 and error["code"] == "model_not_found" and len(error["message"]) < 300
    assert tiny.post(path, model=5, **VALID[path]).status_code == 400


@pytest.mark.parametrize("name", ["gpt-4", "../tiny", "%2e%2e%2ftiny", "m" * 5_000])
def test_r15_an_unknown_model_has_no_card(tiny: RunningServer, name: str) -> None:
    answer = tiny.client.get(f"/v1/models/{name}")
    assert answer.status_code == 404 and len(checked_error(answer)["message"]) < 400


MEDIA: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    {"type": "video_url", "video_url": {"url": "http://169.254.169.254/"}},
    {"type": "file", "file": {"file_id": "x"}},
    {"type": "image_embeds", "image_embeds": "AAAA"},
]


@pytest.mark.parametrize("part", MEDIA, ids=range(len(MEDIA)))
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_r18_r19_r20_media_parts_are_refused_by_name(
    tiny: RunningServer, path: str, part: dict[str, Any]
) -> None:
    error = tiny.refusal(path, messages=[{"role": "user", "content": [part]}])
    assert error["code"] == "unsupported" and part["type"] in error["message"]
    assert error["param"] == "messages"


KWARGS: list[Any] = [
    {"chat_template": "{{ 1 }}"}, {"tokenize": True}, {"messages": []}, {"bos_token": "x"}, {"tools": []},
    {"add_generation_prompt": False}, {"continue_final_message": True}, {"range": 1}, {"x" * 9999: 1},
    {"enable_thinking": True}, [], "x", 5,
]  # fmt: skip


@pytest.mark.parametrize("kwargs", KWARGS, ids=range(len(KWARGS)))
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_r21_template_variables_are_those_the_template_reads(
    tiny: RunningServer, path: str, kwargs: Any
) -> None:
    error = tiny.refusal(path, messages=HELLO, chat_template_kwargs=kwargs)
    assert error["param"] == "chat_template_kwargs" and len(error["message"]) < 300


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_r21_a_template_of_the_requests_own_is_refused(tiny: RunningServer, path: str) -> None:
    error = tiny.refusal(path, messages=HELLO, chat_template="{{ 1 }}")
    assert error["param"] == "chat_template" and error["code"] == "unsupported"


ASKING: dict[str, Any] = {
    "response_format": {"type": "json_object"},
    "tool_choice": "auto",
    "store": True,
    "modalities": ["text", "audio"],
    "service_tier": "flex",
}


def unserved_fields() -> list[tuple[str, str]]:
    fields = [(path, name) for path in GENERATING for name in UNSERVED_GENERATION]
    fields += [(CHAT, name) for name in {**UNSERVED_CHAT, **ChatBody.unserved}]
    return list(dict.fromkeys([*fields, *((COMPLETIONS, name) for name in CompletionBody.unserved)]))


@pytest.mark.parametrize(("path", "field"), unserved_fields())
def test_a_field_that_is_not_served_is_refused_by_name(tiny: RunningServer, path: str, field: str) -> None:
    error = tiny.refusal(path, **VALID[path], **{field: ASKING.get(field, ["x"])})
    assert error["param"] == field and error["code"] == "unsupported" and field in error["message"]
    assert tiny.ok(path, **VALID[path], **{field: None})


@pytest.mark.parametrize("path", POST_ROUTES)
def test_an_unknown_field_is_refused_with_the_nearest_name(tiny: RunningServer, path: str) -> None:
    if path in GENERATING:
        nested = tiny.refusal(path, **VALID[path], stream=True, stream_options={"usage": True})
        assert nested["code"] == "unknown_field" and nested["param"] == "stream_options"
    error = tiny.refusal(path, **VALID[path], modelname="tiny")
    assert error["code"] == "unknown_field" and "'model'" in error["message"]
    long = tiny.refusal(path, **VALID[path], **{"x" * 100_000: 1})
    assert len(long["message"]) < 300 and len(long["param"]) < 100


@pytest.mark.parametrize("name", ["tool_calls", "tool_call_id", "function_call", "audio", "names"])
def test_a_message_field_that_is_not_served_is_refused(tiny: RunningServer, name: str) -> None:
    message = {"role": "assistant", "content": "ba", name: [{}]}
    assert name in tiny.refusal(CHAT, messages=[*HELLO, message])["message"]
    tool = [{"role": "tool", "content": "x"}]
    assert tiny.refusal(CHAT, messages=tool)["code"] == "unsupported"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/batches", "/v1/rerank", "/v1/score",
                                  "/v1/responses/resp_1"])  # fmt: skip
def test_routes_of_a_later_version_are_refused_by_name(tiny: RunningServer, path: str) -> None:
    for method in ("GET", "POST"):
        answer = tiny.client.request(method, path, json={})
        assert answer.status_code == 501 and checked_error(answer)["code"] == "not_served"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/" + "x" * 5000, 404), ("GET", COMPLETIONS, 405),
     ("DELETE", "/v1/models", 405), ("POST", "/v1/completions/", 404)],
)  # fmt: skip
def test_what_is_not_here_is_said_in_the_one_shape(
    tiny: RunningServer, method: str, path: str, status: int
) -> None:
    answer = tiny.client.request(method, path)
    assert answer.status_code == status and len(checked_error(answer)["message"]) < 300


def test_r76_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(tiny: RunningServer) -> None:
    """The loop stays free meanwhile: other requests are answered before the large one."""
    tokenizer = tiny.service.prompts.tokenizer
    calls: list[int] = []
    original = tokenizer.encode

    def counting(text: str, **options: Any) -> list[int]:
        calls.append(len(text))
        return original(text, **options)

    tokenizer.encode = counting  # type: ignore[method-assign]
    try:
        for path, name in ((COMPLETIONS, "prompt"), (EMBEDDINGS, "input"), ("/tokenize", "prompt")):
            assert tiny.refusal(path, **{name: "x" * 10_000_000})["code"] == "context_length_exceeded"
        long = [{"role": "user", "content": "x" * 10_000_000}]
        assert tiny.refusal(CHAT, messages=long)["code"] == "context_length_exceeded"
    finally:
        tokenizer.encode = original  # type: ignore[method-assign]
    assert calls == []


def test_without_a_model_name_the_served_one_answers(tiny: RunningServer) -> None:
    assert tiny.ok(COMPLETIONS, prompt="ba")["model"] == "tiny"
    assert isinstance(tiny.client, httpx.Client)
