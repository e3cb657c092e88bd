"""Word cuts of byte-level vocabularies: every row compiles, and cuts as its models do."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from slipstream.core.errors import CheckpointError
from slipstream.text.pre_tokenizers import WORD_CUTS, word_cut

TEXT = "I'LL pay  1234½ $!\n\n Größe don't HTTPServer 日本語です"


def words(pre: str, text: str = TEXT) -> list[str]:
    return [text[start:stop] for _, (start, stop) in word_cut(pre).build().pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", sorted(WORD_CUTS))
def test_every_row_cuts_without_losing_a_letter(pre: str) -> None:
    assert "".join(words(pre)) == TEXT


def test_gpt2_is_the_librarys_own_cut() -> None:
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert words("gpt-2") == [TEXT[start:stop] for _, (start, stop) in own.pre_tokenize_str(TEXT)]


def test_digits_are_the_librarys_own_cut() -> None:
    own = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert words("smollm") == [TEXT[start:stop] for _, (start, stop) in own.pre_tokenize_str(TEXT)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("llama-bpe", "12345 I'LL", ["123", "45", " I", "'LL"]),
        ("qwen2", "12345 I'LL", ["1", "2", "3", "4", "5", " I", "'LL"]),
        ("gpt-2", "12345 I'LL", ["12345", " I", "'", "LL"]),
        ("gpt-4o", "HTTPServer don't", ["HTTPServer", " don't"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
        ("deepseek-v3", "1234日本語です x", ["123", "4", "日本語です", " x"]),
    ],
)
def test_families_differ_where_their_models_do(pre: str, text: str, expected: list[str]) -> None:
    assert words(pre, text) == expected


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"'qwen'; supported: .*qwen2.*Did you mean 'qwen2'\?"):
        word_cut("qwen")
