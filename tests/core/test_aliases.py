"""Are the tables of foreign names consistent in themselves, and do they drive what option records say?"""

from __future__ import annotations

import pytest

from slipstream.core.aliases import advice_on, aliases_of, names_of
from slipstream.core.errors import ConfigError
from slipstream.core.foreign_names import ENGINES, ForeignName, alias, refused, same
from slipstream.core.foreign_tables import TABLES
from slipstream.core.options import options

ROWS = [(owner, row) for owner, rows in TABLES.items() for row in rows]


def test_each_name_has_one_row() -> None:
    for owner, rows in TABLES.items():
        assert len(names_of(owner)) == len(rows) > 3, owner


@pytest.mark.parametrize(("owner", "row"), ROWS, ids=lambda value: getattr(value, "name", value))
def test_a_row_says_where_it_comes_from_and_what_to_do(owner: str, row: ForeignName) -> None:
    assert set(row.engines) <= set(ENGINES) and list(row.engines) == sorted(row.engines, key="TVS".index)
    # It continues a sentence, and ends before its full stop.
    assert not row.note.removesuffix("...").endswith(".") and row.note.strip() == row.note
    if row.kind == "refused":
        assert row.note and row.name not in aliases_of(owner)
    if owner == "command line":
        assert "_" not in row.name and not row.name.startswith("-")


@pytest.mark.parametrize(
    ("row", "kind", "origin"),
    [
        (same("x", "TVS", 1), "same", "TensorRT-LLM, vLLM, SGLang"),
        (same("x", "V", 1, "as a share"), "converted", "vLLM"),
        (alias("y", "S", 1, "x"), "alias", "SGLang"),
        (refused("y", "", 1, "leave it out"), "refused", "OpenAI"),
    ],
)
def test_the_kind_of_a_row(row: ForeignName, kind: str, origin: str) -> None:
    assert (row.kind, row.origin) == (kind, origin)


def test_lookups_of_an_owner() -> None:
    assert aliases_of("KvCacheConfig") == {"block_size": "tokens_per_block", "page_size": "tokens_per_block"}
    assert "max_batch_size" in advice_on("EngineConfig", "max_running_requests")
    assert advice_on("EngineConfig", "max_num_seqs") == advice_on("EngineConfig", "nobody_says_so") == ""
    assert advice_on("EngineConfig", "tokenizer_path") == "use tokenizer=..."
    assert advice_on("EngineConfig", "disable_cuda_graph") == "use enforce_eager=True."
    assert aliases_of("NoSuchRecord") == {} and advice_on("NoSuchRecord", "x") == ""


def test_a_record_takes_the_rows_of_its_name() -> None:
    class KvCacheConfig:
        tokens_per_block: int = 1

    record = options(aliases={"blk": "tokens_per_block"})(KvCacheConfig)
    assert record(page_size=2).tokens_per_block == record(blk=2).tokens_per_block == 2  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"KvCacheConfig has no option 'max_total_tokens'; use max_tokens="):
        record(max_total_tokens=3)  # type: ignore[call-arg]
