"""Do bad requests harm nobody who streams beside them? The tables of `test_bad_requests`, under an oracle."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.serve.metrics import ServeMetrics
from tests.engine.tiny import VOCAB
from tests.serve.oracle import Oracle, Target
from tests.serve.test_bad_requests import (
    CHAT,
    COMPLETIONS,
    EMPTY,
    HELLO,
    KWARGS,
    MAPS,
    MEDIA,
    POST_ROUTES,
    SAMPLING,
    STOPS,
    VALID,
)
from tests.serve.tiny_server import MODEL, RunningServer

Row = list[tuple[str, dict[str, Any]]]
RAW = [
    b"",
    b"{",
    b"[]",
    b"\xff",
    b'{"a":' * 50_000,
    b'{"prompt":"\\ud800"}',
    b'{"n":' + b"1" * 300_000 + b"}",
]
IDS: list[Any] = [-1, VOCAB, 1.5, True, 2**63, None]
ROWS: dict[str, Row] = {
    "r06": EMPTY,
    "r07": [(COMPLETIONS, {"prompt": [5, bad]}) for bad in IDS],
    "r08": [
        (path, {**VALID[path], name: 10**9}) for path in (COMPLETIONS, CHAT) for name in ("n", "best_of")
    ],
    "r09": [(COMPLETIONS, {"prompt": ["ba"] * 100_000}), (COMPLETIONS, {"prompt": "ba", "n": 1025})],
    "r10": [(COMPLETIONS, {"prompt": "ba", "max_tokens": value}) for value in (0, -1, 2**63, 300)],
    "r11": [(COMPLETIONS, {"prompt": "ba", "logprobs": value}) for value in (-1, 65, 10**9)],
    "r12": [(COMPLETIONS, {"prompt": "ba", "logit_bias": value}) for value in MAPS],
    "r13": [(CHAT, {**VALID[CHAT], name: value}) for name, value in SAMPLING],
    "r14": [(COMPLETIONS, {"prompt": "ba", "stop": value}) for value in STOPS],
    "r15": [(path, {"model": "../x" * 50_000, **VALID[path]}) for path in POST_ROUTES],
    "r19": [(CHAT, {"messages": [{"role": "user", "content": [part]}]}) for part in MEDIA],
    "r21": [(CHAT, {"messages": HELLO, "chat_template_kwargs": value}) for value in KWARGS],
}


@pytest.fixture(scope="module")
def oracle(tiny: RunningServer) -> Oracle:
    if tiny.context.metrics is None:
        tiny.context.metrics = ServeMetrics(tiny.context)

    def free_pages() -> tuple[int, int]:
        stats = tiny.service.stats().result(60)
        return stats["num_free_pages"], stats["num_pages"]

    # The template's process starts with the first chat and stays.
    tiny.ok(CHAT, messages=HELLO, max_tokens=1)
    return Oracle(Target(url=tiny.url, model=MODEL, free_pages=free_pages))


def send(oracle: Oracle, row: Row) -> None:
    with oracle.client() as client:
        for path, body in row:
            oracle.check(client.post(path, json=body))


def test_all_rows_at_once(oracle: Oracle) -> None:
    """R01 to R15, R19 and R21 in one go: each body is refused, and every clause of the oracle holds."""
    with oracle.watching(), oracle.client() as client:
        for path in POST_ROUTES:
            for data in RAW:
                oracle.check(client.post(path, content=data, headers={"Content-Type": "application/json"}))
        for row in ROWS.values():
            send(oracle, row)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_each_row_alone(oracle: Oracle, name: str) -> None:
    with oracle.watching():
        for _ in range(5):
            send(oracle, ROWS[name])
