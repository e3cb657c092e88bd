"""Is `docs/migrating.md` true? Each row of the tables is tried out, and the document is what they make.

After a change of rows, or of what is served: `python tools/write_migrating.py`, and read the diff.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

import slipstream
from slipstream.cli.main import app, run_command
from slipstream.core.aliases import advice_on
from slipstream.core.errors import ConfigError, RequestError, UnsupportedError
from slipstream.core.foreign_names import ForeignName, refused
from slipstream.core.foreign_tables import FLAGS, TABLES
from tools.write_migrating import DOCUMENT, RECORDS, as_code, document, is_served, meaning, section, try_out

OPTIONS = [(owner, row) for owner in RECORDS for row in TABLES[owner]]
TAKEN = [(owner, row) for owner, row in OPTIONS if row.ours]
REFUSED = [(owner, row) for owner, row in OPTIONS if not row.ours]
# An option that a note tells to use, alone or of a record: use x=..., Record(x=...).
MENTIONED = re.compile(r"(?:(\w+)\()?\b(\w+)=")
METHOD_CALL = re.compile(r"\w+\.\w+\([^)]*\)")


def names(value: Any) -> str | None:
    return value.name if isinstance(value, ForeignName) else None


def test_the_document_is_what_the_tables_make() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run: python tools/write_migrating.py"


@pytest.fixture(autouse=True)
def keep_logging() -> Iterator[None]:
    """A command line sets the package's logger up for its process."""
    logger = logging.getLogger("slipstream")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


def field_names(record: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(record)}


def record_of(owner: str) -> Any:
    return type(RECORDS[owner]()) if owner == "EngineConfig" else RECORDS[owner]


@pytest.mark.parametrize(("owner", "row"), TAKEN, ids=names)
def test_a_taken_name_means_ours(owner: str, row: ForeignName) -> None:
    assert row.ours in field_names(record_of(owner))
    if is_served(owner, row):
        record = RECORDS[owner]
        assert record(**{row.name: row.example}) == record(**{row.ours: row.example})
        if row.name != row.ours:
            # Equal to what it was, it would not show that the name arrived.
            assert record(**{row.name: row.example}) != record()
        return
    with pytest.raises((UnsupportedError, RequestError), match=rf"\b{row.ours}\b"):
        try_out(owner, row.name, row.example)


@pytest.mark.parametrize(("owner", "row"), REFUSED, ids=names)
def test_a_refused_name_is_answered_with_its_advice(owner: str, row: ForeignName) -> None:
    with pytest.raises(ConfigError) as caught:
        RECORDS[owner](**{row.name: row.example})
    assert str(caught.value) == f"{owner} has no option {row.name!r}; {advice_on(owner, row.name)}"
    assert row.name not in field_names(record_of(owner))


def records_by_name() -> dict[str, Any]:
    exported = {name: getattr(slipstream, name) for name in slipstream.__all__}
    return exported | {"LLM": record_of("EngineConfig")}


def unknown_mentions(owner: str, row: ForeignName) -> list[str]:
    """Return what a note tells to use and does not exist."""
    found = []
    for holder, option in MENTIONED.findall(METHOD_CALL.sub("", row.note)):
        record = records_by_name()[holder] if holder else record_of(owner)
        if option not in field_names(record):
            found.append(f"{holder or owner}({option}=)")
    return found


@pytest.mark.parametrize(("owner", "row"), REFUSED, ids=names)
def test_advice_names_what_exists(owner: str, row: ForeignName) -> None:
    assert not unknown_mentions(owner, row)


def test_wrong_advice_would_be_seen() -> None:
    row = refused("x", "V", 1, "use kv_cache_config=KvCacheConfig(max_token=...) or LLM(sed=1)")
    assert unknown_mentions("EngineConfig", row) == ["KvCacheConfig(max_token=)", "LLM(sed=)"]


def options_of(command: Any) -> set[str]:
    own = {option for param in command.params for option in param.opts}
    return own.union(*(options_of(inner) for inner in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("row", FLAGS, ids=names)
def test_flags(row: ForeignName, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of(typer.main.get_command(app))
    if row.ours:
        assert f"--{row.ours}" in options
        assert row.name == row.ours or f"--{row.name}" not in options
        return
    value = [] if row.example is None else [row.example]
    assert run_command(["run", "m", "p", f"--{row.name}", *value]) == 2
    said = capsys.readouterr().err
    assert f"has no option '--{row.name}'; {row.note}" in said
    assert all(option in options for option in re.findall(r"--[\w-]+", row.note)), row.note


def test_flags_that_are_taken_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on the first command that has its option."""
    commands = {"run": ["m", "p"], "chat": ["m"], "bench throughput": ["m"], "bench latency": ["m"]}
    commands["serve"] = ["m"]
    seen: list[Any] = []
    for job in ("run.RunJob", "chat.ChatJob", "bench.BenchJob", "serve.ServeJob"):
        monkeypatch.setattr(f"slipstream.cli.{job}.__call__", lambda job: seen.append(job))
    monkeypatch.setattr("slipstream.bench.workload.read_dataset", lambda path, limit: None)
    taken = [row for row in FLAGS if row.ours]
    for row in taken:
        value = [] if row.example is None else [row.example]
        lines = ([*name.split(), *rest, f"--{row.name}", *value] for name, rest in commands.items())
        assert any(run_command(line) == 0 for line in lines), row.name
    assert len(seen) == len(taken)


@pytest.mark.parametrize("owner", ["slipstream", "slipstream bench"])
def test_commands(owner: str, capsys: pytest.CaptureFixture[str]) -> None:
    for row in TABLES[owner]:
        line = [*owner.split()[1:], row.name]
        assert run_command([*line, "--help"] if row.ours else [*line, "m"]) == (0 if row.ours else 2)
        said = capsys.readouterr()
        assert row.ours or f"{owner} has no command {row.name!r}; {row.note}" in said.err
    assert all(f"`{command}" in DOCUMENT.read_text(encoding="utf-8") for command in ("serve", "latency"))


def test_code_in_notes_is_marked() -> None:
    assert as_code("use a_b=C(d=...), or --x-y") == "use `a_b=C(d=...)`, or `--x-y`"
    assert as_code("set HF_TOKEN; see LLM.get_stats()") == "set `HF_TOKEN`; see `LLM.get_stats()`"
    assert as_code("write `x: 1` with --config") == "write `x: 1` with --config"


def test_a_section_tells_kinds_apart() -> None:
    text = "\n".join(section("EngineConfig", "V"))
    assert "| `max_num_seqs` | taken as `max_batch_size` |" in text
    assert "| `block_size` | refused: use `kv_cache_config=KvCacheConfig(tokens_per_block=...)` |" in text
    row = next(row for row in TABLES["EngineConfig"] if row.name == "tp_size")
    assert meaning("EngineConfig", row, served=False) == "taken as `tensor_parallel_size`, not served yet"
