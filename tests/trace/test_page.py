"""Is the page one file that asks for nothing, and does a hostile name stay text in it?"""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from slipstream.engine.step_records import EngineTrace
from slipstream.trace.page import to_html
from slipstream.trace.timeline import timeline_of
from tests.trace.samples import by_hand

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "\u2028\u2029\x00\ud7ff",
    "/*SCRIPT*/",
    "/*DATA*/",
    "&lt;b&gt;",
    '"}]}',
]


class Outline(HTMLParser):
    """Collects elements, their addresses, and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")
        ]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


def outline_of(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    return outline


def named(name: str) -> EngineTrace:
    trace = by_hand()
    events = [msgspec.structs.replace(event, request_id=name, reason=name) for event in trace.events]
    return msgspec.structs.replace(trace, events=events)


def test_the_page_asks_for_nothing() -> None:
    page = to_html(timeline_of(by_hand(), model="m"))
    outline = outline_of(page)
    assert outline.addresses == ["data:,"]
    assert "link" in outline.tags and "iframe" not in outline.tags
    assert "default-src 'none'" in page
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import)\s*\(", page)
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_data(name: str) -> None:
    plain = outline_of(to_html(timeline_of(by_hand(), model="m")))
    page = to_html(timeline_of(named(name), model=name))
    outline = outline_of(page)
    assert outline.tags == plain.tags
    assert outline.scripts[1] == plain.scripts[1], "the script is the same, whatever the data"
    data = json.loads(outline.scripts[0])
    assert data["model"] == name and {lane["request_id"] for lane in data["lanes"]} == {name}
    assert not re.search(r"[<>&\u2028\u2029]", outline.scripts[0])


def test_what_the_page_is_made_of_goes_into_a_wheel() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["slipstream.trace"]
    parts = [
        path.name
        for path in (root / "slipstream" / "trace").iterdir()
        if path.suffix in (".html", ".css", ".js")
    ]
    assert len(parts) == 3
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in parts)
