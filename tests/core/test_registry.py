"""Does a registry stay lazy, name what it knows, and never replace a row in silence?"""

from __future__ import annotations

import sys

import pytest

from slipstream.core.errors import ConfigError
from slipstream.core.registry import Registry


def make_registry() -> Registry:
    return Registry("codec", {"zip": "zipfile:ZipFile", "ghost": "no_such_module:Ghost"})


def test_listing_imports_nothing() -> None:
    registry = make_registry()
    assert registry.names() == ["ghost", "zip"]
    assert list(registry) == ["ghost", "zip"]
    assert "zip" in registry
    assert "tar" not in registry
    assert "no_such_module" not in sys.modules


def test_get_imports_the_row_asked_for() -> None:
    import zipfile

    assert make_registry().get("zip") is zipfile.ZipFile


def test_a_row_whose_module_is_missing_raises_on_use() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        make_registry().get("ghost")


def test_unknown_name_lists_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Unknown codec 'zipp'; valid: ghost, zip\. Did you mean 'zip'\?"):
        make_registry().get("zipp")


def test_far_name_suggests_nothing() -> None:
    with pytest.raises(ConfigError) as caught:
        make_registry().get("qqqqqq")
    assert "Did you mean" not in str(caught.value)


def test_register_takes_classes_and_lazy_rows() -> None:
    registry = make_registry()
    registry.register("number", int)
    registry.register("fraction", "fractions:Fraction")
    assert registry.get("number") is int
    assert registry.get("fraction").__name__ == "Fraction"


def test_register_refuses_a_taken_name_unless_told() -> None:
    registry = make_registry()
    with pytest.raises(ConfigError, match="'zip' is already registered; pass override=True"):
        registry.register("zip", int)
    registry.register("zip", int, override=True)
    assert registry.get("zip") is int


def test_registries_share_no_rows() -> None:
    rows = {"zip": "zipfile:ZipFile"}
    first, second = Registry("codec", rows), Registry("codec", rows)
    first.register("number", int)
    assert second.names() == ["zip"]
    assert rows == {"zip": "zipfile:ZipFile"}
