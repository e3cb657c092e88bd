"""What does a name that people know from another engine mean here?

Looked up in `foreign_tables`, the one source: the aliases that option records take, the advice in their error
messages, the spellings of the command line and `docs/migrating.md` are all made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from slipstream.core.foreign_names import ForeignName
from slipstream.core.foreign_tables import TABLES


@cache
def names_of(owner: str) -> Mapping[str, ForeignName]:
    """Return the rows of one owner (an option record, "command line", a command) by foreign name."""
    return {row.name: row for row in TABLES.get(owner, ())}


def aliases_of(owner: str) -> dict[str, str]:
    """Return foreign name -> our name of everything that is spelled otherwise here and taken."""
    return {row.name: row.ours for row in names_of(owner).values() if row.ours and row.ours != row.name}


def advice_on(owner: str, name: str) -> str:
    """Return the end of a sentence, what to use instead of a refused name; empty for a name nobody has."""
    row = names_of(owner).get(name)
    if row is None or row.kind != "refused":
        return ""
    return row.note if row.note.endswith("...") else f"{row.note}."
