"""Does a workload ask for what its specification says, and nothing a prompt must not hold?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream.bench.workload import (
    BenchRequest,
    DatasetLine,
    RandomWorkload,
    expected_tokens,
    parse_line,
    pool_tokens,
    read_dataset,
)
from slipstream.core.errors import ConfigError


class Letters:
    """A tokenizer of 20 ids with specials among them; a text has one token a character."""

    vocab_size = 20
    special_ids = frozenset({0, 7})
    eos_token_ids = (19,)

    def encode(self, text: str) -> list[int]:
        return [ord(char) % 20 for char in text]


LETTERS: Any = Letters()


def draw(workload: Any) -> list[BenchRequest]:
    return workload.draw(LETTERS, vocab_size=25, eos_token_ids=(3,))


def test_lengths_are_those_asked_for() -> None:
    requests = draw(RandomWorkload(num_requests=50, isl=(3, 6), osl=(2, 2), seed=1))
    assert {len(r.prompt_token_ids) for r in requests} == {3, 4, 5, 6}
    assert {r.output_tokens for r in requests} == {2}


def test_no_special_id_is_drawn_and_every_other_is() -> None:
    requests = draw(RandomWorkload(num_requests=40, isl=(50, 50), osl=(1, 1), seed=2))
    drawn = {token for r in requests for token in r.prompt_token_ids}
    assert drawn == set(range(20)) - {0, 3, 7, 19}


def test_the_seed_decides() -> None:
    def prompts(seed: int) -> list[Any]:
        return [
            r.prompt_token_ids
            for r in draw(RandomWorkload(num_requests=3, isl=(8, 8), osl=(1, 1), seed=seed))
        ]

    assert prompts(4) == prompts(4)
    assert prompts(4) != prompts(5)


@pytest.mark.parametrize(
    "fields",
    [
        {"isl": (0, 4)},
        {"isl": (5, 4)},
        {"osl": (0, 0)},
        {"num_requests": 0},
    ],
)
def test_impossible_specifications_are_refused(fields: dict[str, Any]) -> None:
    given: dict[str, Any] = {"num_requests": 1, "isl": (1, 1), "osl": (1, 1), "seed": 0}
    with pytest.raises(ConfigError):
        RandomWorkload(**(given | fields))


def test_expected_tokens_leave_out_the_last_sampled_one() -> None:
    # 3 prompt tokens and 2 of 3 output tokens run; then 5 prompt tokens and none.
    assert expected_tokens([BenchRequest([1, 2, 3], 3), BenchRequest([1] * 5, 1)]) == 5 + 5


def test_dataset_of_text_and_ids(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '{"prompt": "abc", "output_tokens": 4}\n\n{"prompt_token_ids": [1, 2], "max_tokens": 3}\n',
        encoding="utf-8",
    )
    requests = draw(read_dataset(path))
    assert [(list(r.prompt_token_ids), r.output_tokens) for r in requests] == [
        (LETTERS.encode("abc"), 4),
        ([1, 2], 3),
    ]
    assert len(draw(read_dataset(path, limit=1))) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "a"}', "exactly one of output_tokens and max_tokens"),
        (
            '{"prompt": "a", "output_tokens": 1, "max_tokens": 1}',
            "exactly one of output_tokens and max_tokens",
        ),
        ('{"prompt": "a", "prompt_token_ids": [1], "max_tokens": 1}', "exactly one of prompt and"),
        ('{"promt": "a", "max_tokens": 1}', "Did you mean 'prompt'?"),
        ('{"prompt": "", "max_tokens": 1}', "no usable prompt"),
        ('{"prompt": [1], "prompt_token_ids": "a", "max_tokens": 1}', "exactly one of prompt and"),
        ('{"prompt_token_ids": "abc", "max_tokens": 1}', "no usable prompt"),
        ('{"prompt_token_ids": [1, true], "max_tokens": 1}', "no usable prompt"),
        ('{"prompt": "a", "max_tokens": 0}', "asks for 0 output tokens"),
        ('{"prompt": "a", "max_tokens": true}', "asks for True output tokens"),
        ('{"prompt": "a", "max_tokens": "9"}', "asks for '9' output tokens"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_wrong_line_is_named(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_line(line, "d.jsonl:3")
    assert "d.jsonl:3" in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_a_dataset_without_lines_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"requests\.jsonl"):
        read_dataset(path)


def test_a_missing_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_dataset(tmp_path / "none.jsonl")


def test_the_pool_holds_the_largest_requests_that_run_together() -> None:
    # Blocks of 32: 40 tokens take 2, 100 take 4; one to spare for each.
    assert pool_tokens([40, 100, 40], max_running=2) == (3 + 5) * 32
    assert pool_tokens([40], max_running=64) == 3 * 32


def test_estimates_cover_the_output() -> None:
    assert DatasetLine((1, 2, 3), 5).estimated_tokens == 8
    assert DatasetLine("x" * 30, 5).estimated_tokens >= 10 + 5
