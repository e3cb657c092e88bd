"""Who notices what a bad input did to the others? Victims, a canary, and books that must balance.

The oracle of every row of our reliability table: four greedy streams run beside the bad input and must say
exactly what they say undisturbed; then a canary is answered, and free pages, threads and file descriptors are
back where they were.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from slipstream import LLM, RequestError, RequestOutput, SamplingParams
from tests.engine.tiny import VOCAB, prompt_ids, wait_idle

# Catches a hang only.
DEADLINE_S = 60.0
VICTIMS = [prompt_ids(6 + 5 * i, seed=60 + i) for i in range(4)]
VICTIM_PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)
# No token of a victim, so that a hook can tell the bad request by it.
MARK = VOCAB - 1


class Oracle:
    """An engine, what its victims say undisturbed, and the checks that follow a bad request."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        # Starts what starts once: the process of the chat template, the threads of torch.
        llm.chat([{"role": "user", "content": "hi"}], SHORT)
        self.expected = [llm.generate(p, VICTIM_PARAMS).outputs[0].token_ids for p in VICTIMS]
        assert all(MARK not in ids for ids in self.expected)
        wait_idle(llm)
        self.threads = threading.active_count()
        self.fds = num_fds()

    @contextlib.contextmanager
    def victims(self) -> Iterator[None]:
        """Run the victims beside the block; then check them, the canary and what is left behind."""
        llm = self.llm
        streams = [llm.generate_async(prompt, VICTIM_PARAMS, streaming=True) for prompt in VICTIMS]
        heads = [next(iter_of) for iter_of in map(first_update, streams)]
        assert not any(head.finished for head in heads)
        yield
        for stream, expected in zip(streams, self.expected, strict=True):
            output = stream.result(DEADLINE_S)
            assert output.error is None, f"a victim failed: {output.error}"
            assert output.outputs[0].token_ids == expected, "a victim says something else"
        self.check_rest()

    def check_rest(self) -> None:
        canary = self.llm.generate_async(VICTIMS[0], VICTIM_PARAMS).result(DEADLINE_S)
        assert canary.outputs[0].token_ids == self.expected[0], "the canary says something else"
        wait_idle(self.llm)
        assert threading.active_count() <= self.threads, "threads are left"
        assert num_fds() <= self.fds, "files are left open"

    def refuses(self, prompt: Any, *, param: str = "", code: str = "", **params: Any) -> RequestError:
        """Assert that a request is refused for `param`, and say so in its output too."""
        output = self.llm.generate([prompt], SamplingParams(**params))[0]
        assert isinstance(output, RequestOutput) and output.finished
        error = output.error
        assert error is not None, f"{params} was not refused"
        assert output.outputs[0].finish_reason == "error"
        assert not param or error.param == param, error.message
        assert not code or error.code == code
        # Bounded, and without a path, an address or a traceback.
        assert 10 < len(error.message) < 600
        assert not any(leak in error.message for leak in ("Traceback", "0x", "/site-packages", ".py"))
        return error


def first_update(generation: Any) -> Iterator[RequestOutput]:
    """Read one update without the loop that aborts when it is left."""

    def read() -> Iterator[RequestOutput]:
        yield generation._outputs.get(timeout=DEADLINE_S)

    return read()


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
