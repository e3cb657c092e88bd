"""Can a running request be read in every way, by threads and coroutines, and is it aborted when dropped?"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.engine.generation import Generation

DEADLINE_S = 20.0


class Source:
    """A generation and the three outputs that a thread puts into it."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.generation = Generation("r", self.aborted.append)

    def put(self, *numbers: int) -> None:
        for number in numbers:
            sample = CompletionOutput(0, token_ids=list(range(number)))
            self.generation.put(RequestOutput("r", None, [1], [sample], finished=number == 3))

    def put_later(self) -> threading.Thread:
        thread = threading.Timer(0.05, lambda: self.put(1, 2, 3))
        thread.start()
        return thread


@pytest.fixture
def source() -> Source:
    return Source()


def run(test: Callable[[], object]) -> None:
    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))  # type: ignore[arg-type]


def sizes(outputs: list[RequestOutput]) -> list[int]:
    return [len(output.outputs[0].token_ids) for output in outputs]


def test_a_loop_yields_each_output_once(source: Source) -> None:
    source.put_later()
    assert sizes(list(source.generation)) == [1, 2, 3]
    assert list(source.generation) == []
    assert not source.aborted


def test_leaving_a_loop_aborts(source: Source) -> None:
    source.put(1, 2, 3)
    for _ in source.generation:
        break
    assert source.aborted == ["r"]


def test_an_exception_in_a_loop_aborts(source: Source) -> None:
    source.put(1)

    def read() -> None:
        for _ in source.generation:
            raise KeyError

    with pytest.raises(KeyError):
        read()
    assert source.aborted == ["r"]


def test_result_waits_for_the_last_output_and_keeps_it(source: Source) -> None:
    source.put_later()
    assert source.generation.result(DEADLINE_S).finished
    assert source.generation.result(0.0).finished
    assert not source.aborted


def test_result_after_a_part_of_a_loop_is_the_end(source: Source) -> None:
    """What was read already is not asked for again."""
    source.put(1, 2, 3)
    reader = iter(source.generation)
    next(reader)
    assert sizes([source.generation.result(1.0)]) == [3]
    reader.close()
    assert not source.aborted


def test_result_gives_up_after_its_timeout_in_all(source: Source) -> None:
    """The timeout is for the whole wait, however many updates come meanwhile."""
    is_over = threading.Event()

    def drip() -> None:
        while not is_over.wait(0.02):
            source.put(1)

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        with pytest.raises(TimeoutError, match=r"r did not finish in 0\.2 s"):
            source.generation.result(0.2)
    finally:
        is_over.set()
        thread.join()
    assert not source.aborted
    source.put(3)
    assert source.generation.result(DEADLINE_S).finished


def test_async_iteration(source: Source) -> None:
    async def read() -> None:
        source.put_later()
        assert sizes([output async for output in source.generation]) == [1, 2, 3]

    run(read)
    assert not source.aborted


def test_await_returns_the_last_output(source: Source) -> None:
    async def read() -> None:
        source.put_later()
        assert sizes([await source.generation]) == [3]
        assert sizes([await source.generation]) == [3]

    run(read)


def test_a_loop_of_coroutines_is_not_blocked(source: Source) -> None:
    async def read() -> None:
        waiting = asyncio.ensure_future(source.generation.aresult())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        source.put(1, 2, 3)
        assert (await waiting).finished

    run(read)


def test_a_cancelled_wait_aborts(source: Source) -> None:
    async def read() -> None:
        waiting = asyncio.ensure_future(source.generation.aresult())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(read)
    assert source.aborted == ["r"]


def test_leaving_an_async_loop_aborts_once_it_is_closed(source: Source) -> None:
    async def read() -> None:
        source.put(1)
        reader = source.generation.__aiter__()
        await reader.__anext__()
        await reader.aclose()  # type: ignore[attr-defined]

    run(read)
    assert source.aborted == ["r"]


def test_outputs_after_the_loop_was_closed_do_not_raise(source: Source) -> None:
    """The reader's event loop may end while the engine still delivers."""

    async def read() -> None:
        source.put(1)
        reader = source.generation.__aiter__()
        await reader.__anext__()
        kept.append(reader)

    kept: list[object] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(read())
    loop.close()
    source.put(2, 3)
    assert source.generation.result(DEADLINE_S).finished


def test_abort_names_the_request(source: Source) -> None:
    source.generation.abort()
    source.generation.abort()
    assert source.aborted == ["r", "r"]
