"""What does somebody see who opens the page? Driven in a headless Chromium.

A screenshot of each is left in the folder that `SLIPSTREAM_SCREENSHOTS` names, for people to look at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream.trace.page import to_html
from slipstream.trace.timeline import timeline_of
from tests.trace.samples import WHY, by_hand, of_engine

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)}")
DEADLINE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox"], timeout=DEADLINE_MS
        )
        yield browser
        browser.close()


class Opened:
    """A page in the browser, and everything it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, *, scheme: str = "light", width: int = 1200) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(DEADLINE_MS)
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("window.traceView !== undefined")

    def view(self) -> dict[str, Any]:
        return self.page.evaluate("traceView()")

    def shot(self, name: str) -> None:
        folder = os.environ.get("SLIPSTREAM_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Opened]:
    path = tmp_path / "trace.html"
    path.write_text(to_html(timeline_of(by_hand(), model="tiny <b>model</b>")), encoding="utf-8")
    page = Opened(browser, path)
    yield page
    assert page.troubles == []
    assert page.requests == [path.as_uri()]
    page.context.close()


def test_figures_and_table(opened: Opened) -> None:
    page = opened.page
    assert page.locator("h1").inner_text() == "Trace tiny <b>model</b>"
    assert (
        "2023-11-14 22:13:20.000 UTC; the ring has let go of 5 earlier steps"
        in page.locator("#about").inner_text()
    )
    tiles = dict(
        zip(
            page.locator("#tiles dt").all_inner_texts(),
            page.locator("#tiles dd").all_inner_texts(),
            strict=True,
        )
    )
    assert tiles == {
        "Requests": "3",
        "Steps": "5",
        "Prefill tokens": "42 + 4 cached",
        "Decode tokens": "4",
        "Tokens/s": "460",
        "First token, median": "28 ms",
        "First token, p95": "28 ms",
        "Preemptions": "1",
    }
    page.locator("summary").click()
    rows = [row.locator("td").all_inner_texts() for row in page.locator("#rows tr").all()]
    assert rows == [
        ["a", "0 µs", "11 ms", "28 ms", "59 ms", "24", "4", "4", "1", "length"],
        ["c", "0 µs", "0 µs", "?", "19 ms", "?", "?", "7", "0", "stop"],
        ["b", "15 ms", "85 ms", "?", "85 ms", "3", "?", "?", "0", "goes on"],
    ]
    opened.shot("trace-by-hand")


def pixels(page: Any) -> int:
    """Return how many pixels of the lanes are drawn in some colour."""
    return page.evaluate(
        """() => {
          const canvas = document.getElementById("lanes");
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          let found = 0;
          for (let i = 3; i < data.length; i += 4) if (data[i] > 200) found++;
          return found;
        }"""
    )


def test_details_under_the_pointer(opened: Opened) -> None:
    page = opened.page
    assert pixels(page) > 2000
    box = page.locator("#lanes").bounding_box()
    left = min(190, max(96, box["width"] * 0.16))
    width = box["width"] - left - 12
    # The first lane at 38 of 100 ms: preempted.
    page.mouse.move(box["x"] + left + width * 0.38, box["y"] + 14)
    page.locator("#tip").wait_for(state="visible")
    tip = page.locator("#tip").inner_text()
    assert tip.startswith("a\n") and "preempted, 6.0 ms" in tip and WHY in tip
    page.mouse.move(box["x"] + left + width * 0.15, box["y"] + 14)
    assert "tokens 4 to 20, step 5" in page.locator("#tip").inner_text()
    top = page.locator("#top").bounding_box()
    page.mouse.move(top["x"] + left + width * 0.15, top["y"] + top["height"] - 30)
    tip = page.locator("#tip").inner_text()
    assert tip.startswith("Step 5\n") and "prefill tokens\t16" in tip and "25%" in tip


def test_keys_zoom_move_and_filter(opened: Opened) -> None:
    page = opened.page
    whole = opened.view()
    assert (whole["start_s"], whole["end_s"]) == (0, pytest.approx(0.1))
    page.keyboard.press("+")
    page.keyboard.press("+")
    near = opened.view()
    assert near["end_s"] - near["start_s"] == pytest.approx(0.1 / 1.5**2)
    page.keyboard.press("ArrowRight")
    assert opened.view()["start_s"] > near["start_s"]
    page.keyboard.press("0")
    assert opened.view() == whole
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert opened.view()["picked"] == 1 and page.locator("#tip").inner_text().startswith("c\n")
    page.keyboard.press("Enter")
    assert opened.view()["end_s"] == pytest.approx(0.019 * 1.12)
    page.keyboard.press("Escape")
    page.keyboard.press("0")
    page.keyboard.press("/")
    page.keyboard.type("goes")
    assert opened.view()["shown"] == ["b"]
    page.keyboard.type("-nowhere")
    assert page.locator("#empty").is_visible() and opened.view()["shown"] == []
    page.keyboard.press("Escape")
    assert opened.view()["shown"] == ["a", "c", "b"] and page.locator("#empty").is_hidden()
    # Near the end only "a" and "b" are there.
    for _ in range(4):
        page.keyboard.press("+")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert opened.view()["shown"] == ["a", "c", "b"]
    page.keyboard.press("v")
    assert opened.view()["start_s"] > 0.019 and opened.view()["shown"] == ["a", "b"]
    page.keyboard.press("0")
    assert opened.view()["shown"] == ["a", "c", "b"]
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_mouse_zooms_and_drags(opened: Opened) -> None:
    page = opened.page
    box = page.locator("#top").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 100)
    page.mouse.wheel(0, -400)
    page.wait_for_function("traceView().end_s - traceView().start_s < 0.09")
    before = opened.view()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 100)
    page.mouse.up()
    after = opened.view()
    assert after["start_s"] > before["start_s"]
    assert after["end_s"] - after["start_s"] == pytest.approx(before["end_s"] - before["start_s"])


@pytest.mark.parametrize(("scheme", "width"), [("dark", 1200), ("light", 390)])
def test_an_engine_s_trace_in_the_dark_and_on_a_phone(
    browser: Any, tmp_path: Path, scheme: str, width: int
) -> None:
    path = tmp_path / "trace.html"
    path.write_text(to_html(timeline_of(of_engine(), model="m")), encoding="utf-8")
    opened = Opened(browser, path, scheme=scheme, width=width)
    page = opened.page
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert opened.view()["shown"] == [f"r{number}" for number in range(8)]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "nothing to scroll sideways"
    )
    assert pixels(page) > 500
    opened.shot(f"trace-{scheme}-{width}")
    assert opened.troubles == []
    opened.context.close()
