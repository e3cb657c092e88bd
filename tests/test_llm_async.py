"""Does `AsyncLLM` serve many coroutines at once, never block their loop, and end what nobody reads?"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import slipstream.llm as llm_module
from slipstream import LLM, AsyncLLM, SamplingParams
from slipstream.core.errors import ConfigError, EngineError, RequestError
from tests.engine.tiny import prompt_ids, tiny_llama, write_folder

# Catches a hang only: everything here takes a second or two on one core.
DEADLINE_S = 60.0
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_seq_len": 256}
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tiny_llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sync_llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, **OPTIONS) as llm:
        yield llm


def run(test: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), DEADLINE_S))


async def until_idle(llm: AsyncLLM) -> dict[str, Any]:
    while (stats := await llm.get_stats())["num_running"] or stats["num_waiting"]:
        await asyncio.sleep(0.005)
    return stats


def test_a_hundred_streams_at_once_say_what_the_plain_door_says(folder: Path, sync_llm: LLM) -> None:
    prompts = [prompt_ids(5 + i % 20, seed=i) for i in range(100)]
    params = SamplingParams(max_tokens=12)
    expected = [output.outputs[0].token_ids for output in sync_llm.generate(prompts, params)]

    async def read(llm: AsyncLLM, i: int) -> list[int]:
        tokens: list[int] = []
        async for output in llm.generate(prompts[i], params, request_id=f"r{i}"):
            assert output.request_id == f"r{i}"
            tokens += output.outputs[0].token_ids_diff
        return tokens

    async def test() -> None:
        async with AsyncLLM(folder, **OPTIONS) as llm:
            assert await asyncio.gather(*(read(llm, i) for i in range(100))) == expected

    run(test)


def test_a_stream_comes_in_parts_and_an_await_returns_the_end(folder: Path, sync_llm: LLM) -> None:
    prompt, params = prompt_ids(9, seed=1), SamplingParams(max_tokens=10, ignore_eos=True)
    message = [{"role": "user", "content": "ba de"}]
    expected = sync_llm.generate(prompt, params).outputs[0].token_ids
    answer = sync_llm.chat(message, params).outputs[0]

    async def test() -> None:
        llm = await AsyncLLM.create(folder, **OPTIONS)
        try:
            updates = [output async for output in llm.generate(prompt, params)]
            assert len(updates) == 10 and updates[-1].finished and not updates[-2].finished
            assert (await llm.generate(prompt, params)).outputs[0].token_ids == expected
            assert (await llm.chat(message, params)).outputs[0].text == answer.text
            texts = [output.outputs[0].text_diff async for output in llm.chat(message, params)]
            assert "".join(texts) == answer.text and len(texts) > 1
        finally:
            await llm.shutdown()
            await llm.shutdown()

    run(test)


def test_the_loop_runs_on_while_a_model_loads_and_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocked, the loop could not count at all; the bound is far below what a busy machine lets through.

    A tiny model may load before the loop counts to 5, so the load waits for that: blocked, it waits in vain.
    """
    has_counted = threading.Event()

    def serve_once_counted(*args: Any, **options: Any) -> Any:
        assert has_counted.wait(30.0), "the loop stood still while the model loaded"
        return local_service(*args, **options)

    local_service = llm_module.local_service
    monkeypatch.setattr(llm_module, "local_service", serve_once_counted)

    async def test() -> None:
        ticks = 0

        async def count() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1
                if ticks == 5:
                    has_counted.set()

        counting = asyncio.create_task(count())
        await asyncio.sleep(0)
        async with AsyncLLM(folder, **OPTIONS) as llm:
            while_loading, ticks = ticks, 0
            await llm.generate(prompt_ids(50, seed=3), LONG)
            while_answering, ticks = ticks, 0
            await llm.encode([prompt_ids(200, seed=i) for i in range(8)])
            while_encoding = ticks
        counting.cancel()
        assert min(while_loading, while_answering, while_encoding) >= 5

    run(test)


@pytest.mark.parametrize("when", ["in the stream", "in the body", "before the first token"])
def test_a_cancelled_task_aborts_its_request(folder: Path, when: str) -> None:
    async def test() -> None:
        async with AsyncLLM(folder, **OPTIONS) as llm:
            is_reading = asyncio.Event()

            async def read() -> None:
                async for _ in llm.generate(prompt_ids(9, seed=1), LONG, request_id="long"):
                    is_reading.set()
                    if when == "in the body":
                        await asyncio.sleep(DEADLINE_S)

            task = asyncio.create_task(read())
            if when == "before the first token":
                await asyncio.sleep(0)
            else:
                await is_reading.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            started = time.monotonic()
            # The thread that sends a request nobody waits for may not have come to it yet.
            await asyncio.sleep(0.05)
            stats = await until_idle(llm)
            assert time.monotonic() - started < DEADLINE_S / 2
            assert stats["finish_reasons"] in ({"cancelled": 1}, {})
            assert stats["finish_reasons"] or when == "before the first token"
            assert stats["num_free_pages"] == stats["num_pages"]

    run(test)


def test_leaving_a_stream_or_an_await_that_times_out_aborts(folder: Path) -> None:
    async def test() -> None:
        async with AsyncLLM(folder, **OPTIONS) as llm:
            async for _ in llm.generate(prompt_ids(9, seed=1), LONG):
                break
            await asyncio.sleep(0)
            await until_idle(llm)
            # The whole answer takes far more: 200 steps of about a millisecond.
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(llm.generate(prompt_ids(20, seed=2), LONG).aresult(), 0.02)
            stats = await until_idle(llm)
            assert stats["finish_reasons"].get("length", 0) == 0
            assert stats["executed_tokens"] < 2 * 200

    run(test)


def test_abort_by_id_ends_the_stream_with_a_last_output(folder: Path) -> None:
    async def test() -> None:
        async with AsyncLLM(folder, **OPTIONS) as llm:
            last = None
            async for output in llm.generate(prompt_ids(9, seed=1), LONG, request_id="mine"):
                llm.abort("mine")
                last = output
            assert last is not None and last.outputs[0].finish_reason == "cancelled"
            llm.abort("mine")
            llm.abort("unknown")

    run(test)


def test_what_is_wrong_raises_where_it_is_seen(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_seq_len"):
        AsyncLLM(folder, max_seq_lem=10)
    idle = AsyncLLM(folder, **OPTIONS)
    with pytest.raises(EngineError, match="not started"):
        idle.generate("x")

    async def test() -> None:
        async with AsyncLLM(folder, **OPTIONS) as llm:
            with pytest.raises(RequestError, match="empty"):
                await llm.generate("")
            with pytest.raises(RequestError, match="max_tokens"):
                async for _ in llm.generate([5], SamplingParams(max_tokens=0)):
                    pass
            assert (await llm.generate([5, 6], SamplingParams(max_tokens=2))).finished

    run(test)
    run(idle.shutdown)
