"""Turn ends count when they are known, in the vocabulary and written by the template."""

from __future__ import annotations

import pytest

from slipstream.text.eos_tokens import turn_end_ids

VOCAB = {"<end_of_turn>": 106, "<|im_end|>": 2, "<|user|>": 7}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, []),
        ("", []),
        ("{{ '<start_of_turn>' }}x{{ '<end_of_turn>' }}", [106]),
        ("<|im_end|><end_of_turn>", [106, 2]),
        ("<|user|>", []),
        ("<|eot_id|>", []),
    ],
)
def test_turn_ends(template: str | None, expected: list[int]) -> None:
    assert turn_end_ids(template, VOCAB.get) == expected
