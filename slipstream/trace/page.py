"""How does a timeline become one HTML page? Markup, style, script and data in one file that asks for nothing.

Invariant: data stands in a script element that is not run, with every character that could end it written as
an escape; the page's policy allows no connection at all.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from slipstream.trace.timeline import Timeline

HERE = Path(__file__).resolve().parent
# What could end the element that holds the data, or a line of script in it.
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def to_html(timeline: Timeline) -> str:
    """Return the page."""
    data = msgspec.json.encode(timeline).decode("utf-8")
    for character, escape in ESCAPES.items():
        data = data.replace(character, escape)
    page = (HERE / "timeline.html").read_text(encoding="utf-8")
    parts = {
        "/*STYLE*/": (HERE / "timeline.css").read_text(encoding="utf-8"),
        "/*SCRIPT*/": (HERE / "timeline.js").read_text(encoding="utf-8"),
        "/*DATA*/": data,
    }
    # Data comes last, so that nothing in it is taken for a place to fill.
    for place, content in parts.items():
        page = page.replace(place, content, 1)
    return page
