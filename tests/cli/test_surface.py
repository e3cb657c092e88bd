"""Which commands and options are there? A snapshot, so that none changes in passing.

After a change on purpose: `SLIPSTREAM_UPDATE_SURFACE=1 pytest tests/cli/test_surface.py`, and read the diff
of `surface.json`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer.main

from slipstream.cli.main import app
from slipstream.cli.options import HABITS

SNAPSHOT = Path(__file__).with_name("surface.json")
# What each argument and option says of itself in every supported version of typer.
FACTS = ("required", "multiple", "is_flag")


def surface_of(command: Any) -> dict[str, Any]:
    commands = getattr(command, "commands", {})
    return {
        "arguments": [param.name for param in command.params if param.param_type_name == "argument"],
        "options": {
            " ".join([*param.opts, *param.secondary_opts]): {
                **{fact: True for fact in FACTS if getattr(param, fact, False)},
                "default": shown_default(param.default),
            }
            for param in command.params
            if param.param_type_name == "option" and param.name != "help"
        },
        "commands": {name: surface_of(commands[name]) for name in sorted(commands)},
    }


def shown_default(value: Any) -> str | None:
    """Versions differ in how they say that there is none."""
    return None if value is None or value is False else str(value)


def test_the_surface_is_the_snapshot() -> None:
    surface = surface_of(typer.main.get_command(app))
    if os.environ.get("SLIPSTREAM_UPDATE_SURFACE"):
        SNAPSHOT.write_text(json.dumps(surface, indent=1) + "\n", encoding="utf-8")
    assert surface == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def all_options(surface: dict[str, Any]) -> set[str]:
    own = {name for names in surface["options"] for name in names.split()}
    return own.union(*(all_options(inner) for inner in surface["commands"].values()))


def test_every_habit_leads_to_an_option() -> None:
    options = all_options(surface_of(typer.main.get_command(app)))
    assert {f"--{ours}" for ours in HABITS.values()} <= options
    assert not {f"--{habit}" for habit in HABITS} & options


@pytest.mark.parametrize("command", ["run", "chat", "throughput", "latency"])
def test_every_option_says_what_it_does(command: str) -> None:
    root: Any = typer.main.get_command(app)
    known = {**root.commands, **root.commands["bench"].commands}
    assert known[command].help
    for param in known[command].params:
        assert getattr(param, "help", None), param.name
