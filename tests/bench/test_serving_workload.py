"""Are requests drawn as specified, again and again the same, and a trace read or refused by its line?"""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from random import Random
from typing import Any

import pytest

from slipstream.bench.measure import BenchError
from slipstream.bench.serving_lengths import SHAREGPT, LogNormal, Uniform
from slipstream.bench.serving_prompts import IdWriter, WordWriter
from slipstream.bench.serving_record import ServingRequest
from slipstream.bench.serving_trace_file import read_trace
from slipstream.bench.serving_workload import DrawnWorkload
from slipstream.core.errors import ConfigError


def drawn(count: int, *, point: int = 1, **fields: Any) -> list[ServingRequest]:
    facts = {"prompt": Uniform(5, 9), "output": Uniform(4, 4), "seed": 3, **fields}
    return list(itertools.islice(DrawnWorkload(**facts).requests(WordWriter(), point=point), count))


def words(request: ServingRequest) -> list[str]:
    assert isinstance(request.prompt, str)
    return request.prompt.split()


def test_what_is_drawn_follows_from_the_seed() -> None:
    assert drawn(20) == drawn(20) and drawn(20) != drawn(20, seed=4)
    assert {len(words(request)) for request in drawn(100)} == {5, 6, 7, 8, 9}
    assert {request.output_tokens for request in drawn(20)} == {4}


def test_points_share_no_prompt() -> None:
    assert not {r.prompt for r in drawn(50, point=1)} & {r.prompt for r in drawn(50, point=2)}


def test_shared_prefixes_come_in_turn() -> None:
    requests = drawn(12, shared_prefix=20, num_prefixes=3)
    heads = [tuple(words(request)[:20]) for request in requests]
    assert len(set(heads)) == 3 and heads == heads[:3] * 4
    assert all(25 <= len(words(request)) <= 29 for request in requests)
    assert not set(heads) & {
        tuple(words(r)[:20]) for r in drawn(3, point=2, shared_prefix=20, num_prefixes=3)
    }


def test_sharegpt_lengths() -> None:
    """The means that its docstring states, within what 4,000 draws of such a spread allow."""
    generator = Random(0)
    for lengths, mean in zip(SHAREGPT, (220, 200), strict=True):
        values = [lengths.draw(generator) for _ in range(4000)]
        assert min(values) >= 4 and max(values) <= 1024
        assert statistics.fmean(values) == pytest.approx(mean, rel=0.1)


@pytest.mark.parametrize("make", [lambda: Uniform(0, 3), lambda: Uniform(4, 3), lambda: LogNormal(2000, 1)])
def test_impossible_lengths(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_words_are_calibrated() -> None:
    writer = WordWriter.calibrated((20 + 16 * 2, 20 + 272 * 2))
    assert (writer.tokens_per_word, writer.base_tokens) == (2.0, 20.0)
    assert len(str(writer.write(Random(0), 100)).split()) == 40
    assert len(str(writer.write(Random(0), 100, prefix="a b")).split()) == 52
    with pytest.raises(BenchError):
        WordWriter.calibrated((16, 16))


def test_ids_are_exact_and_ordinary() -> None:
    ids = IdWriter(1000).write(Random(0), 500)
    assert isinstance(ids, list) and len(ids) == 500 and min(ids) >= 256 and max(ids) < 1000
    assert IdWriter(1000).write(Random(0), 2, prefix=[7])[0] == 7
    with pytest.raises(ConfigError):
        IdWriter(256)


def trace_of(tmp_path: Path, *lines: Any, **options: Any) -> list[ServingRequest]:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8"
    )
    workload = read_trace(path, **{"seed": 0, "speed": 1.0, "limit": None, **options})
    return list(workload.requests(WordWriter(), point=1))


def test_trace(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 3000, "input_length": 7, "output_length": 2},
        {"timestamp": 1000, "prompt": "hello", "output_tokens": 3},
        {"timestamp": 1500, "prompt_token_ids": [1, 2], "max_tokens": 4},
    ]
    requests = trace_of(tmp_path, *lines, speed=2.0)
    assert [request.due_s for request in requests] == [0.0, 0.25, 1.0]
    assert [request.output_tokens for request in requests] == [3, 4, 2]
    assert [request.prompt for request in requests[:2]] == ["hello", [1, 2]]
    assert len(words(requests[2])) == 7
    assert len(trace_of(tmp_path, *lines, limit=2)) == 2


def test_hash_ids_share_blocks(tmp_path: Path) -> None:
    one, two = trace_of(
        tmp_path,
        {"timestamp": 0, "input_length": 1100, "output_length": 1, "hash_ids": [1, 2, 3]},
        {"timestamp": 0, "input_length": 1030, "output_length": 1, "hash_ids": [1, 2, 9]},
    )
    assert (len(words(one)), len(words(two))) == (1100, 1030)
    assert words(one)[:1024] == words(two)[:1024]
    assert words(one)[1024:1030] != words(two)[1024:]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "trace.jsonl:2 is not JSON"),
        ("[]", "not a JSON object"),
        ({"timestamp": 0, "input_lenght": 5, "output_length": 1}, "Did you mean 'input_length'"),
        ({"timestamp": -1, "input_length": 5, "output_length": 1}, "timestamp -1"),
        ({"timestamp": 0, "input_length": 0, "output_length": 1}, "no usable prompt"),
        ({"timestamp": 0, "prompt": "", "output_length": 1}, "no usable prompt"),
        ({"timestamp": 0, "prompt_token_ids": [True], "output_length": 1}, "no usable prompt"),
        ({"timestamp": 0, "prompt": "a", "input_length": 5, "output_length": 1}, "exactly one of prompt"),
        ({"timestamp": 0, "prompt": "a"}, "exactly one of output_length"),
        ({"timestamp": 0, "prompt": "a", "max_tokens": 0}, "0 output tokens"),
        ({"timestamp": 0, "prompt": "a", "max_tokens": 1, "hash_ids": [1]}, "hash_ids and a prompt"),
        ({"timestamp": 0, "input_length": 1, "max_tokens": 1, "hash_ids": [0.5]}, "no list of whole numbers"),
        ({"input_length": 1, "max_tokens": 1}, "on some lines only"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trace_of(tmp_path, {"timestamp": 0, "prompt": "a", "max_tokens": 1}, line)


def test_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no line"):
        trace_of(tmp_path)
    with pytest.raises(ConfigError, match="must be above 0"):
        trace_of(tmp_path, {"prompt": "a", "max_tokens": 1}, speed=0.0)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none", seed=0, speed=1.0, limit=None)
