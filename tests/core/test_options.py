"""Do option records refuse every name they do not know, and translate the ones people type from habit?"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from slipstream.core.errors import ConfigError
from slipstream.core.options import options, translate


@options(aliases={"max_num_seqs": "max_batch_size"})
class Section:
    """A small section."""

    max_batch_size: int = 64
    names: list[str] = dataclasses.field(default_factory=list[str])
    policy: str


def test_defaults_and_given_values() -> None:
    section = Section(policy="fair")
    assert (section.max_batch_size, section.names, section.policy) == (64, [], "fair")
    assert Section(policy="fair").names is not section.names


def test_alias_sets_our_name() -> None:
    assert Section(policy="fair", max_num_seqs=8).max_batch_size == 8  # pyright: ignore[reportCallIssue]


def test_unknown_name_raises_with_valid_names_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        Section(policy="fair", max_batchsize=8)  # pyright: ignore[reportCallIssue]
    message = str(caught.value)
    assert "Section has no option 'max_batchsize'" in message
    assert "valid: max_batch_size, names, policy" in message
    assert "Did you mean 'max_batch_size'?" in message


def test_nearest_name_may_be_an_alias() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'max_num_seqs'\?"):
        Section(policy="fair", max_num_seq=8)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    "given",
    [{"max_batch_size": 1, "max_num_seqs": 2}, {"max_num_seqs": 2, "max_batch_size": 1}],
)
def test_a_name_and_its_alias_together_raise(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="got 'max_batch_size' twice"):
        Section(policy="fair", **given)


def test_missing_value_raises() -> None:
    with pytest.raises(TypeError, match="policy"):
        Section()  # pyright: ignore[reportCallIssue]


def test_records_are_frozen_and_keyword_only() -> None:
    section = Section(policy="fair")
    with pytest.raises(dataclasses.FrozenInstanceError):
        section.policy = "other"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        Section("fair")  # pyright: ignore[reportCallIssue]


def test_records_compare_and_copy_by_value() -> None:
    section = Section(policy="fair", max_batch_size=2)
    assert section == Section(policy="fair", max_batch_size=2)
    assert dataclasses.replace(section, policy="strict") == Section(policy="strict", max_batch_size=2)


def test_translate_keeps_values_untouched() -> None:
    marker = object()
    assert translate({"b": marker}, ["a"], {"b": "a"}, "Owner") == {"a": marker}
