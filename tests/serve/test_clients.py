"""Do the clients that people have work unchanged? OpenAI's, httpx, LangChain and lm-eval, on a real model."""

from __future__ import annotations

import asyncio
import json
import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from slipstream import SamplingParams
from slipstream.core.outputs import RequestOutput
from slipstream.engine.config import EngineConfig
from slipstream.engine.service import local_service
from tests.serve.sse_protocol import joined_text, read_events
from tests.serve.tiny_server import MODEL, RunningServer, serving

QUESTION: Any = [{"role": "user", "content": "Name three rivers."}]
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def smol(smollm2_path: Path) -> Iterator[RunningServer]:
    service = local_service(EngineConfig(model=smollm2_path, device="cpu", max_seq_len=1024))
    try:
        with serving(service) as server:
            yield server
    finally:
        service.close()


@pytest.fixture(scope="module")
def client(smol: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{smol.url}/v1", api_key="none", timeout=DEADLINE_S, max_retries=0
    ) as client:
        yield client


def test_openai_chats(client: openai.OpenAI, smol: RunningServer) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
    encoded = smol.service.prompts.encode_chat(QUESTION, True, {})
    request = smol.service.create_request(encoded, SamplingParams(max_tokens=24, temperature=0.0))
    outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    smol.service.submit(request, outputs.put)
    assert answer.choices[0].message.content == outputs.get(timeout=DEADLINE_S).outputs[0].text
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens_details is not None


def test_openai_streams(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**body)
    stream = client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage is not None
    until = {**body, "max_tokens": 100, "stop": [text[10:14]]}
    with client.chat.completions.stream(**until) as events:
        assert events.get_final_completion().choices[0].message.content == text[: text.index(text[10:14])]


def test_openai_completes_and_names_logprobs(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0}
    answer = client.completions.create(**body, max_tokens=3, logprobs=2, echo=True)
    choice = answer.choices[0]
    assert choice.text.startswith("The capital of France is Paris")
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**body, max_tokens=3, stream=True)]
    assert "The capital of France is" + "".join(pieces) == choice.text
    chat = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=2, logprobs=True, top_logprobs=3
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [3, 3]


def test_openai_takes_extras_and_embeds(client: openai.OpenAI) -> None:
    extra = {"top_k": 1, "min_tokens": 4, "repetition_penalty": 1.1, "cache_salt": "s"}
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=6, extra_body=extra)
    assert answer.choices[0].message.content
    found = client.embeddings.create(model=MODEL, input=["a river", "a mountain"])
    exact = client.embeddings.create(model=MODEL, input="a river", encoding_format="float")
    assert len(found.data) == 2 and len(found.data[0].embedding) == 576
    # The client asks for base64 by itself; both are the same float32 numbers, of steps of different sizes.
    assert found.data[0].embedding == pytest.approx(exact.data[0].embedding, abs=2e-2)
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_openai_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert tools.value.code == "unsupported"
    with pytest.raises(openai.APIStatusError) as later:
        client.responses.create(model=MODEL, input="x")
    assert later.value.status_code == 501


def test_openai_streams_many_at_once(smol: RunningServer) -> None:
    async def read(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=8, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of(prompts: list[str]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{smol.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(read(client, prompt) for prompt in prompts))

    prompts = [f"Number {i} is" for i in range(8)]
    texts = asyncio.run(asyncio.wait_for(all_of(prompts), DEADLINE_S))
    assert len(texts) == 8 and all(texts)
    smol.wait_idle()


def test_plain_http_reads_a_stream_line_by_line(smol: RunningServer) -> None:
    body = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, "stream": True}
    with smol.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200 and answer.headers["cache-control"] == "no-cache"
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len(chunks) > 8
    again = smol.post("/v1/chat/completions", **body)
    assert joined_text(read_events(again.text)) == joined_text(chunks)
    assert isinstance(answer, httpx.Response)


@pytest.mark.slow
def test_langchain_chats_and_streams(smol: RunningServer) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        model=MODEL, base_url=f"{smol.url}/v1", api_key="none", temperature=0, max_tokens=16, max_retries=0
    )
    whole = model.invoke("Name three rivers.")
    assert whole.content and whole.usage_metadata["output_tokens"] == 16
    assert "".join(chunk.content for chunk in model.stream("Name three rivers.")) == whole.content
    embeddings = langchain_openai.OpenAIEmbeddings(
        model=MODEL, base_url=f"{smol.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    assert len(embeddings.embed_query("a river")) == 576


TASK = """
task: spelling
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_lm_eval_scores_choices_over_http(smol: RunningServer, tmp_path: Path) -> None:
    """A task of our own, so that nothing is fetched: the model prefers the end that makes sense."""
    pytest.importorskip("lm_eval")
    data = tmp_path / "task.json"
    documents = [
        {"question": "The capital of France is", "choices": [" Paris", " banana"], "label": 0},
        {"question": "The opposite of hot is", "choices": [" purple", " cold"], "label": 1},
        {"question": "Two plus two is", "choices": [" four", " river"], "label": 0},
    ]
    data.write_text("\n".join(json.dumps(document) for document in documents))
    (tmp_path / "spelling.yaml").write_text(TASK.format(data=data))
    arguments = f"model={MODEL},base_url={smol.url}/v1/completions,tokenizer_backend=remote,num_concurrent=1"
    code = (
        "import sys; from lm_eval.__main__ import cli_evaluate; "
        f"sys.argv = ['lm_eval', '--model', 'local-completions', '--model_args', {arguments!r}, "
        f"'--tasks', 'spelling', '--include_path', {str(tmp_path)!r}, "
        f"'--output_path', {str(tmp_path / 'out')!r}]; "
        "cli_evaluate()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    [found] = (tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["spelling"]["acc,none"] == 1.0
