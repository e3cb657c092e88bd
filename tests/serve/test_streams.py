"""Do streams say what the whole answer says, keep the protocol, and end at once when nobody reads?"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from slipstream.core.errors import RequestError
from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.engine import output_processor
from slipstream.serve.chat_chunks import ChatChunks, ChatForm
from slipstream.serve.completion_chunks import CompletionChunks, CompletionForm
from slipstream.serve.errors import ApiError
from slipstream.serve.logprobs import TokenNames
from slipstream.serve.submission import AnswerHead
from slipstream.text.detokenizer import IncrementalDetokenizer
from tests.engine.tiny import prompt_ids
from tests.serve.sse_protocol import finish_reason, joined_text, read_events, split_events
from tests.serve.tiny_server import RunningServer, checked_error

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DEADLINE_S = 60.0


def whole_and_stream(server: RunningServer, number: int) -> tuple[Any, list[Any], dict[str, Any]]:
    """Return both forms of the answer to one of many different bodies."""
    rng = random.Random(number)
    body: dict[str, Any] = {
        "seed": number,
        "temperature": rng.choice([0, 0.7, 1.5]),
        "max_tokens": rng.randint(1, 12),
        "n": rng.choice([1, 1, 2]),
        "stop": rng.choice([None, ["e"], ["a ", "du"]]),
        "min_tokens": rng.choice([None, 1]),
    }
    words = " ".join(rng.choice(["ba", "de", "fi", "né", "🦀", "嗨"]) for _ in range(rng.randint(1, 9)))
    has_logprobs = rng.random() < 0.5
    if number % 2:
        path = COMPLETIONS
        body |= {"prompt": [words, words[::-1]] if rng.random() < 0.3 else words}
        body |= {"echo": rng.random() < 0.3, "logprobs": 2 if has_logprobs else None}
    else:
        path = CHAT
        body |= {"messages": [{"role": "user", "content": words}]}
        body |= {"logprobs": has_logprobs, "top_logprobs": 2 if has_logprobs else None}
    usage = {"include_usage": True}
    return server.ok(path, **body), server.events(path, stream_options=usage, **body), body


def spoken_tokens(choice: dict[str, Any]) -> list[str]:
    """Return the tokens that a choice's log-probabilities name."""
    logprobs = choice.get("logprobs")
    if not logprobs:
        return []
    if "content" in logprobs:
        return [entry["token"] for entry in logprobs["content"]]
    return logprobs["tokens"]


def test_r31_a_stream_adds_up_to_the_whole(tiny: RunningServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: whole_and_stream(tiny, number), range(200)))
    reasons: set[str] = set()
    for whole, chunks, body in found:
        for choice in whole["choices"]:
            index = choice["index"]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert joined_text(chunks, index) == text, body
            assert finish_reason(chunks, index) == choice["finish_reason"]
            reasons.add(choice["finish_reason"])
            parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert [t for part in parts for t in spoken_tokens(part)] == spoken_tokens(choice), body
        counted = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [chunks[-1]["usage"][k] for k in counted] == [whole["usage"][k] for k in counted]
    assert reasons == {"stop", "length"}
    tiny.wait_idle()


class Script:
    """An engine's answer to one request, token by token, as the hub would deliver it."""

    def __init__(self, server: RunningServer, path: str) -> None:
        names = TokenNames(server.service.prompts.tokenizer, as_ids=False)
        plain: dict[str, Any] = {
            "num_logprobs": None, "names": names, "returns_ids": False,
            "wants_usage": True, "wants_running_usage": False,
        }  # fmt: skip
        head = AnswerHead("test", "tiny")
        self.writer: Any = (
            ChatChunks(head, ChatForm(**plain))
            if path == CHAT
            else CompletionChunks(head, CompletionForm(num_samples=1, echoes=None, **plain))
        )

    def write(
        self, *samples: CompletionOutput, error: RequestError | None = None, finished: bool = False
    ) -> str:
        output = RequestOutput("r", None, [1, 2, 3], list(samples), finished=finished, error=error)
        return self.writer.write([(0, output)]).decode()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_r32_chunks_come_in_order_whatever_a_delta_holds(tiny: RunningServer, path: str) -> None:
    script = Script(tiny, path)
    text = script.write(CompletionOutput(0, "", [5]))
    text += script.write(CompletionOutput(0, 'a "quoted"\n\n', [6]))
    text += script.write(CompletionOutput(0, "", [7]))
    text += script.write(CompletionOutput(0, " end", [8], finish_reason="stop", stop_reason=2), finished=True)
    text += script.writer.finish().decode()
    chunks = read_events(text, has_usage=True)
    assert joined_text(chunks) == 'a "quoted"\n\n end' and chunks[-1]["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_r32_an_answer_of_nothing_is_an_answer(tiny: RunningServer, path: str) -> None:
    script = Script(tiny, path)
    text = script.write(CompletionOutput(0, "", [2], finish_reason="stop"), finished=True)
    chunks = read_events(text + script.writer.finish().decode(), has_usage=True)
    assert joined_text(chunks) == "" and finish_reason(chunks) == "stop"


def test_r33_a_failed_output_never_becomes_a_chunk(tiny: RunningServer) -> None:
    script = Script(tiny, CHAT)
    script.write(CompletionOutput(0, "a", [5]))
    failed = RequestError("row 3 is not finite", code="numerical_error")
    with pytest.raises(RequestError):
        script.write(CompletionOutput(0, "", [], finish_reason="error"), error=failed, finished=True)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the processing of a request's output raise at a token; the list says at which."""

    at = [0]
    original = output_processor.Sample.take

    def take(self: Any, event: Any) -> bool:
        if at[0] and len(self.output.token_ids) + 1 >= at[0]:
            raise RuntimeError("secret detail of the inside")
        return original(self, event)

    monkeypatch.setattr(output_processor.Sample, "take", take)
    return at


@pytest.mark.parametrize("at", [1, 2, 7])
def test_r33_a_request_that_fails_at_a_token_fails_alone(
    tiny: RunningServer, failing: list[int], at: int
) -> None:
    """Before the client has seen anything there is a status left to say it with; later only the event is."""
    failing[0] = at
    answer = tiny.post(COMPLETIONS, prompt="ba", stream=True, max_tokens=20, ignore_eos=True, temperature=0)
    assert "secret" not in answer.text and "[DONE]" not in answer.text
    if answer.status_code == 500:
        assert checked_error(answer)["code"] == "processing_error"
    else:
        assert at > 1 and split_events(answer.text)[-1][0] == "error"
    failing[0] = 0
    tiny.wait_idle()
    assert tiny.ok(COMPLETIONS, prompt="ba")["choices"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_r33_an_error_after_the_first_token_is_an_event(
    tiny: RunningServer, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listeners: list[Any] = []
    requests: list[Any] = []

    def deliver(text: str, reason: Any = None, error: RequestError | None = None) -> None:
        sample = CompletionOutput(0, text, [70], finish_reason=reason)
        ids = requests[0].prompt_token_ids
        output = RequestOutput("r", None, ids, [sample], finished=reason is not None, error=error)
        listeners[0](output)
        tiny.context.hub.flush()

    def submit(request: Any, listener: Any, *, streams: Any = False) -> None:
        requests.append(request)
        listeners.append(listener)
        deliver("one")

    monkeypatch.setattr(tiny.service, "submit", submit)
    prompt = {"prompt": "ba"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "ba"}]}
    with tiny.client.stream("POST", path, json={**prompt, "stream": True}) as answer:
        parts = answer.iter_text()
        received = ""
        while '"one"' not in received:
            received += next(parts)
        deliver("", "error", RequestError("OSError: /srv/secret", code="numerical_error"))
        received += "".join(parts)
    *events, (name, data) = split_events(received)
    assert name == "error" and not any(name for name, _ in events)
    error, request_id = json.loads(data)["error"], answer.headers["x-request-id"]
    assert error["code"] == "numerical_error" and request_id in error["message"]
    assert "secret" not in received and "[DONE]" not in received and '"finish_reason":"' not in received
    assert any(request_id in r.getMessage() and "secret" in r.getMessage() for r in caplog.records)


def leave_after(server: RunningServer, body: dict[str, Any], num_bytes: int, delay_s: float) -> None:
    """Send a body, read so many bytes of the answer, wait a moment and close the connection."""
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        received = 0
        while received < num_bytes and (part := connection.recv(4096)):
            received += len(part)
        time.sleep(delay_s)


def leave_at_random(server: RunningServer, count: int) -> None:
    def one(number: int) -> None:
        rng = random.Random(number)
        body = {
            "prompt": prompt_ids(rng.choice([3, 100, 180]), seed=number),
            "max_tokens": rng.choice([1, 5, 60]),
            "ignore_eos": True,
            "stream": rng.random() < 0.7,
            "n": rng.choice([1, 2]),
        }
        leave_after(server, body, rng.choice([0, 0, 1, 400, 4000]), rng.choice([0, 0, 0.002, 0.02]))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(count)))


def test_r34_who_leaves_at_any_moment_leaves_nothing_behind(tiny: RunningServer) -> None:
    before = tiny.ok(COMPLETIONS, prompt="ba de", temperature=0)["choices"]
    leave_at_random(tiny, 50)
    tiny.wait_idle()
    assert tiny.ok(COMPLETIONS, prompt="ba de", temperature=0)["choices"] == before


@pytest.mark.slow
def test_r34_a_thousand_who_leave(tiny: RunningServer) -> None:
    leave_at_random(tiny, 1000)
    tiny.wait_idle()


def test_r34_who_leaves_while_sending_is_no_failure_of_ours(
    tiny: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Content-Length: 999\r\n\r\n"
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=DEADLINE_S) as connection:
            connection.sendall(head.encode() + b'{"prompt":')
    assert tiny.ok(COMPLETIONS, prompt="ba")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_r34_a_stream_that_is_left_is_aborted_at_once(tiny: RunningServer) -> None:
    """The engine would need some hundred steps to end it; it is gone before."""
    aborted: list[str] = []
    original = tiny.service.abort
    tiny.service.abort = lambda request_id, index=None: (  # type: ignore[method-assign]
        aborted.append(request_id),
        original(request_id, index),
    )[1]
    try:
        body = {"prompt": prompt_ids(5, seed=1), "max_tokens": 250, "ignore_eos": True, "stream": True}
        leave_after(tiny, body, 600, 0.0)
        deadline = time.monotonic() + DEADLINE_S
        while not aborted:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        tiny.wait_idle()
    finally:
        tiny.service.abort = original  # type: ignore[method-assign]


@pytest.mark.parametrize("text", ["🦀", "嗨", "né", "👩‍👩‍👧"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_r29_no_character_is_cut(tiny: RunningServer, text: str, path: str) -> None:
    """The whole character comes in one chunk, and half of one only as the very last text."""
    tokenizer = tiny.service.prompts.tokenizer
    ids = tokenizer.encode_ordinary(text, is_start=False)
    assert len(ids) > 1
    detokenizer = IncrementalDetokenizer(tokenizer, [70])
    script = Script(tiny, path)
    sent = "".join(script.write(CompletionOutput(0, detokenizer.append([i]), [i])) for i in ids)
    sent += script.write(CompletionOutput(0, detokenizer.flush(), [], finish_reason="length"), finished=True)
    chunks = read_events(sent + script.writer.finish().decode(), has_usage=True)
    assert joined_text(chunks) == text and "\\ufffd" not in sent and "\ufffd" not in sent


def test_r29_bytes_of_half_a_character_are_held_until_the_end(tiny: RunningServer) -> None:
    crab = tiny.service.prompts.tokenizer.encode_ordinary("🦀", is_start=False)
    body = {"prompt": [70], "allowed_token_ids": [crab[0]], "max_tokens": 3, "temperature": 0}
    chunks = tiny.events(COMPLETIONS, **body)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == tiny.ok(COMPLETIONS, **body)["choices"][0]["text"]
    assert texts[-1].endswith("\ufffd")


def test_r30_nothing_of_a_stop_string_leaks_into_a_stream(tiny: RunningServer) -> None:
    body: dict[str, Any] = {"prompt": "ba de", "temperature": 0, "ignore_eos": True, "max_tokens": 30}
    text = tiny.ok(COMPLETIONS, **body)["choices"][0]["text"]
    for start in range(2, len(text) - 6, 7):
        for length in (1, 3, 6):
            stop = text[start : start + length]
            expected = text[: text.index(stop)]
            chunks = tiny.events(COMPLETIONS, stop=[stop, stop + "#"], **body)
            assert joined_text(chunks) == expected and finish_reason(chunks) == "stop"


def test_answers_wait_for_no_other_answer(tiny: RunningServer) -> None:
    """Sixty-four streams at once come to the same as one after the other."""
    body = {"temperature": 0, "ignore_eos": True, "max_tokens": 10}
    prompts = [prompt_ids(4 + i % 9, seed=i) for i in range(64)]
    alone = [tiny.ok(COMPLETIONS, prompt=prompt, **body)["choices"][0]["text"] for prompt in prompts[:8]]
    with ThreadPoolExecutor(64) as pool:
        streams = list(pool.map(lambda p: tiny.events(COMPLETIONS, prompt=p, **body), prompts))
    assert [joined_text(chunks) for chunks in streams[:8]] == alone
    assert all(finish_reason(chunks) == "length" for chunks in streams)


def test_the_loop_is_woken_once_a_batch(tiny: RunningServer) -> None:
    hub, wakes, outputs = tiny.context.hub, [0], [0]
    original, deliver = hub._hand_out, hub.deliver
    loop_thread: set[int] = set()

    def counted() -> None:
        wakes[0] += 1
        loop_thread.add(threading.get_ident())
        original()

    def delivered(*arguments: Any) -> None:
        outputs[0] += 1
        deliver(*arguments)

    hub._hand_out, hub.deliver = counted, delivered  # type: ignore[method-assign]
    try:
        prompts = [prompt_ids(4, seed=i) for i in range(32)]
        tiny.events(COMPLETIONS, prompt=prompts, max_tokens=10, ignore_eos=True, temperature=0)
    finally:
        hub._hand_out, hub.deliver = original, deliver  # type: ignore[method-assign]
    # Ten steps, and at most as many more as prompts come one after the other.
    assert outputs[0] == 320 and wakes[0] <= 10 + 32 and len(loop_thread) == 1


def test_a_request_that_runs_out_of_time_says_so(tiny: RunningServer) -> None:
    body = {"prompt": "ba", "ignore_eos": True, "max_tokens": 200}
    answer = tiny.post(COMPLETIONS, timeout=1e-6, **body)
    assert answer.status_code == 504 and checked_error(answer)["code"] == "timeout"
    stream = tiny.post(COMPLETIONS, timeout=1e-6, stream=True, **body)
    assert stream.status_code == 504 and checked_error(stream)["code"] == "timeout"


def test_an_engine_that_takes_nothing_is_a_503(tiny: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = ApiError(503, "The server is draining.", code="draining", headers={"Retry-After": "5"})
    monkeypatch.setattr(tiny.context, "refusal", refusal)
    for path in (COMPLETIONS, CHAT, "/v1/embeddings", "/tokenize"):
        answer = tiny.post(path, prompt="ba")
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert checked_error(answer)["code"] == "draining"


def test_a_full_queue_is_a_429(tiny: RunningServer) -> None:
    bounds = tiny.context.admission.bounds
    ticket = tiny.context.admission.admit("", num_requests=bounds.max_requests, num_tokens=1)
    try:
        answer: httpx.Response = tiny.post(COMPLETIONS, prompt="ba")
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        checked_error(answer)
    finally:
        ticket.release()
    assert tiny.ok(COMPLETIONS, prompt="ba")
