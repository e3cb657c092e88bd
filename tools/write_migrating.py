"""Write `docs/migrating.md`: what the names of other engines are here.

    python tools/write_migrating.py

All rows come from `slipstream/core/foreign_tables.py`. Whether a name is served is tried out, not written
down: its example is given to the record that takes it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slipstream.cache.config import KvCacheConfig  # noqa: E402
from slipstream.core.errors import RequestError, UnsupportedError  # noqa: E402
from slipstream.core.foreign_names import ENGINES, ForeignName  # noqa: E402
from slipstream.core.foreign_tables import TABLES  # noqa: E402
from slipstream.core.limits import Limits  # noqa: E402
from slipstream.core.request import Request  # noqa: E402
from slipstream.core.sampling_params import SamplingParams  # noqa: E402
from slipstream.engine.config import EngineConfig, SchedulerConfig  # noqa: E402

DOCUMENT = ROOT / "docs" / "migrating.md"
LIMITS = Limits(vocab_size=64, max_seq_len=128, eos_token_ids=(1,))
TITLES = {
    "EngineConfig": "Arguments of `LLM`",
    "KvCacheConfig": "`KvCacheConfig`",
    "SchedulerConfig": "`SchedulerConfig`",
    "SamplingParams": "`SamplingParams`",
    "command line": "Options of the command line",
    "slipstream": "Commands",
    "slipstream bench": "Commands of `slipstream bench`",
    "metrics": "Metrics of `/metrics`",
}
INTRO = """\
# Migrating

What you type from habit works here, or is refused with the right name in the message; nothing is accepted and
ignored. A name is *taken* where another spelling means the same, and *refused* where it does not exist here.
*Not served yet* are names that are ours too and whose feature this version lacks: they are refused by name.

Written by `python tools/write_migrating.py` from `slipstream/core/foreign_tables.py`; change the rows there.

## Where the same word means something else

| | TensorRT-LLM | vLLM | SGLang | here |
|---|---|---|---|---|
| memory | `free_gpu_memory_fraction`: of what is free after the weights | `gpu_memory_utilization`: of the \
total, all included | `mem_fraction_static`: of the total, weights and cache | the first two with these \
meanings, and `KvCacheConfig(max_tokens=...)` or `KvCacheConfig(max_gpu_total_bytes="40GiB")` |
| sampling, unset | greedy | temperature 1.0 | the model's `generation_config.json` | greedy |
| `max_tokens`, unset | 32 | 16 | 128 | 32; `None` fills the context |
| `seed`, unset | fixed | fresh | fresh | fresh randomness for each request |
| admission | what is sure to fit | what fits now | what fits now | what fits now (`MAX_UTILIZATION`) |

`token_ids` of an output include the stop token that ended it; its text does not.
"""
CODE = re.compile(
    r"[\w.]+=\{[^}]*\}|[\w.]+=[^\s;,]+|[\w.]+\([^)]*\)|(?<!\w)--[\w-]+|\b[A-Z]+_[A-Z_]+\b|\b[A-Z]\w+\.\w+"
)


def engine_record(**given: Any) -> EngineConfig:
    return EngineConfig(**({"model": "m"} | given))


RECORDS: dict[str, Callable[..., Any]] = {
    "EngineConfig": engine_record,
    "KvCacheConfig": KvCacheConfig,
    "SchedulerConfig": SchedulerConfig,
    "SamplingParams": SamplingParams,
}


def try_out(owner: str, name: str, value: Any) -> Any:
    """Return the record, or for SamplingParams the request, that takes `name`; raises as it does."""
    record = RECORDS[owner](**{name: value})
    if owner == "SamplingParams":
        return Request.create([2] * 8, record, LIMITS, request_id="r", default_seed=0)
    return record


def is_served(owner: str, row: ForeignName) -> bool:
    """Tell whether the feature of a taken name exists."""
    if owner not in RECORDS:
        return True
    try:
        try_out(owner, row.ours, row.example)
    except UnsupportedError:
        return False
    except RequestError as error:
        # Refused for another reason (a tokenizer that is missing here, say) is known all the same.
        return error.code != "unsupported"
    return True


def as_code(note: str) -> str:
    """Put what is typed in a note into backticks."""
    return note if "`" in note else CODE.sub(lambda match: f"`{match.group()}`", note)


def spelled(owner: str, name: str) -> str:
    return f"`--{name}`" if owner == "command line" else f"`{name}`"


def sentence(label: str, owner: str, rows: list[ForeignName]) -> Iterator[str]:
    if rows:
        names = ", ".join(spelled(owner, row.name) for row in sorted(rows, key=lambda row: row.name))
        yield f"{label}: {names}."
        yield ""


def section(owner: str, engine: str) -> Iterator[str]:
    """Yield one engine's names of one owner: the same ones in a sentence, the others in a table."""
    rows = [row for row in TABLES[owner] if engine in row.engines]
    if not rows:
        return
    served = {row.name: row.kind == "refused" or is_served(owner, row) for row in rows}
    is_same = {row.name: row.ours == row.name for row in rows}
    yield f"### {TITLES[owner]}"
    yield ""
    plain = [row for row in rows if is_same[row.name] and served[row.name] and not row.note]
    yield from sentence("The same", owner, plain)
    later = [row for row in rows if is_same[row.name] and not served[row.name]]
    yield from sentence("Not served yet", owner, later)
    others = [row for row in rows if row not in plain and row not in later]
    if others:
        yield f"| {ENGINES[engine]} | here |"
        yield "|---|---|"
        for row in sorted(others, key=lambda row: (row.kind == "refused", row.name)):
            yield f"| {spelled(owner, row.name)} | {meaning(owner, row, served[row.name])} |"
        yield ""


def meaning(owner: str, row: ForeignName, served: bool) -> str:
    if owner == "metrics":
        # Nobody types them: they are read off, or the dashboard is changed.
        return as_code(row.note) if not row.ours else f"`{row.ours}`" + (f", {row.note}" if row.note else "")
    if row.kind == "refused":
        return f"refused: {as_code(row.note)}"
    parts = ["the same" if row.name == row.ours else f"taken as {spelled(owner, row.ours)}"]
    if row.note:
        parts.append(as_code(row.note))
    return "; ".join(parts) + ("" if served else ", not served yet")


def document() -> str:
    lines = [INTRO]
    for letter, engine in ENGINES.items():
        lines += [f"## From {engine}", ""]
        for owner in TABLES:
            lines += section(owner, letter)
    lines += ["## From OpenAI's API", ""]
    for owner, rows in TABLES.items():
        lines += [f"- {spelled(owner, row.name)}: {as_code(row.note)}" for row in rows if not row.engines]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")
