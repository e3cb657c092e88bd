"""Is `/v1/chat/completions` what OpenAI's clients expect? Messages, templates, choices, streams."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.sse_protocol import finish_reason, joined_text
from tests.serve.tiny_server import MODEL, RunningServer

PATH = "/v1/chat/completions"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 6}
HELLO = [{"role": "user", "content": "ba de"}]


def text_of(server: RunningServer, messages: Any, **body: Any) -> str:
    answer = server.ok(PATH, messages=messages, **{**GREEDY, **body})
    return answer["choices"][0]["message"]["content"]


def test_an_answer_has_the_fields_clients_read(tiny: RunningServer) -> None:
    answer = tiny.ok(PATH, model=MODEL, messages=HELLO, **GREEDY)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 6


def test_a_chat_is_its_rendered_prompt_completed(tiny: RunningServer) -> None:
    ids = tiny.ok("/tokenize", messages=HELLO)["tokens"]
    text = tiny.ok("/detokenize", tokens=ids)["prompt"]
    assert text == "<s>user: ba de<end_of_turn>model: "
    completed = tiny.ok("/v1/completions", prompt=ids, **GREEDY)["choices"][0]["text"]
    assert text_of(tiny, HELLO) == completed == text_of(tiny, None, prompt_token_ids=ids)


def test_an_answer_fills_the_context_where_nothing_is_said(tiny: RunningServer) -> None:
    answer = tiny.ok(PATH, messages=HELLO, temperature=0, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 256 and answer["choices"][0]["finish_reason"] == "length"
    bounded = tiny.ok(PATH, messages=HELLO, max_completion_tokens=3, ignore_eos=True)
    assert bounded["usage"]["completion_tokens"] == 3
    assert (
        "max_completion_tokens"
        in (tiny.refusal(PATH, messages=HELLO, max_tokens=2, max_completion_tokens=3)["message"])
    )


def test_text_parts_are_text(tiny: RunningServer) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "ba"}, {"type": "text", "text": "de"}]}]
    assert text_of(tiny, parts) == text_of(tiny, [{"role": "user", "content": "ba\nde"}])


def test_history_may_come_back_as_it_was_answered(tiny: RunningServer) -> None:
    answer = tiny.ok(PATH, messages=HELLO, **GREEDY)["choices"][0]["message"]
    again = [*HELLO, answer, {"role": "user", "content": "fi"}]
    assert tiny.ok(PATH, messages=again, **GREEDY)["usage"]["prompt_tokens"] > 20


def test_the_last_message_is_continued_on_request(tiny: RunningServer) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "So "}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    ids = tiny.ok("/tokenize", messages=messages, **body)["tokens"]
    text = tiny.ok("/detokenize", tokens=ids)["prompt"]
    assert text == "<s>user: ba de<end_of_turn>assistant: So "
    completed = tiny.ok("/v1/completions", prompt=ids, **GREEDY)["choices"][0]["text"]
    assert text_of(tiny, messages, **body) == completed
    bare = tiny.ok("/tokenize", messages=HELLO, add_generation_prompt=False)["tokens"]
    assert tiny.ok("/detokenize", tokens=bare)["prompt"] == "<s>user: ba de<end_of_turn>"
    both = tiny.refusal(PATH, messages=HELLO, continue_final_message=True, add_generation_prompt=True)
    assert "add_generation_prompt" in both["message"]


def test_r26_control_tokens_in_a_message_are_plain_text(tiny: RunningServer) -> None:
    """Also in a message that is continued: the only control tokens are those the template writes."""
    messages = [{"role": "user", "content": "a<end_of_turn>b<s>"}, {"role": "assistant", "content": "<s>c"}]
    plain = tiny.ok("/tokenize", messages=messages)["tokens"]
    assert [token for token in plain if token < 4] == [1, 3, 3]
    open_end = tiny.ok("/tokenize", messages=messages, continue_final_message=True)["tokens"]
    assert [token for token in open_end if token < 4] == [1, 3]
    text = tiny.ok("/detokenize", tokens=open_end)["prompt"]
    assert text == "<s>user: a<end_of_turn>b<s><end_of_turn>assistant: <s>c"


def test_logprobs_name_exactly_the_likeliest(tiny: RunningServer) -> None:
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    choice = tiny.ok(PATH, **body, **GREEDY)["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"] and len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["token"] == entry["token"]
    chunks = tiny.events(PATH, **body, **GREEDY)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    streamed = [entry for part in parts if part for entry in part["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]
    none = tiny.ok(PATH, messages=HELLO, logprobs=True, **GREEDY)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in none)


def test_a_stream_is_the_whole_in_parts(tiny: RunningServer) -> None:
    options = {"include_usage": True}
    body: dict[str, Any] = {"messages": HELLO, "n": 3, "seed": 5, "max_tokens": 20}
    whole = tiny.ok(PATH, **body)
    chunks = tiny.events(PATH, stream_options=options, **body)
    for choice in whole["choices"]:
        assert joined_text(chunks, choice["index"]) == choice["message"]["content"]
        assert finish_reason(chunks, choice["index"]) == choice["finish_reason"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["usage"] | {"prompt_tokens_details": 0} == whole["usage"] | {"prompt_tokens_details": 0}


def test_prompt_logprobs_and_ids_stand_beside_the_choices(tiny: RunningServer) -> None:
    answer = tiny.ok(PATH, messages=HELLO, prompt_logprobs=0, return_token_ids=True, **GREEDY)
    ids = tiny.ok("/tokenize", messages=HELLO)["tokens"]
    assert answer["prompt_token_ids"] == ids and len(answer["prompt_logprobs"]) == len(ids)
    assert len(answer["choices"][0]["token_ids"]) == 6


@pytest.mark.parametrize(
    "harmless",
    [
        {"response_format": {"type": "text"}},
        {"tools": []},
        {"tools": None, "tool_choice": "none"},
        {"functions": None, "store": False},
        {"service_tier": "auto", "modalities": ["text"]},
        {"logit_bias": None, "stop": None, "user": "somebody"},
        {"add_special_tokens": False, "echo": False},
    ],
)
def test_fields_that_ask_for_nothing_pass(tiny: RunningServer, harmless: dict[str, Any]) -> None:
    assert text_of(tiny, HELLO, **harmless) == text_of(tiny, HELLO)
