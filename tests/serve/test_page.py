"""What does somebody see who opens `/`? The page's files over HTTP, and the page in a headless Chromium.

Screenshots are left in pytest's folder of each test, for people to look at.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from slipstream.engine.config import EngineConfig
from slipstream.engine.service import EngineService, local_service
from slipstream.serve.auth import PAGE_FILES, PAGE_PATHS
from slipstream.serve.errors import ApiError
from slipstream.serve.metrics import ServeMetrics
from slipstream.serve.page_routes import FOLDER
from slipstream.serve.settings import ApiKey, ServeSettings
from tests.engine.tiny import tiny_llama, write_folder
from tests.serve.tiny_server import RunningServer, checked_error, serving

ROOT = Path(__file__).resolve().parent.parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
DEADLINE_MS = 20_000
KEY = "secret-of-ann"
KEYED = ServeSettings(api_keys=(ApiKey("ann", KEY),))
# What an answer takes a token, so that there is time to look at it and to stop it.
TOKEN_S = 0.02
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineService]:
    folder = write_folder(tiny_llama(), tmp_path_factory.mktemp("model"))
    service = local_service(EngineConfig(model=folder, device="cpu", dtype="float32", max_seq_len=256))
    submit = service.submit

    def submit_slowly(request: Any, listener: Callable[[Any], None], *, streams: Any = False) -> None:
        def heard(output: Any) -> None:
            time.sleep(TOKEN_S)
            listener(output)

        submit(request, heard, streams=streams)

    service.submit = submit_slowly  # type: ignore[method-assign]
    yield service
    service.close()


@pytest.fixture(scope="module")
def open_server(service: EngineService) -> Iterator[RunningServer]:
    with serving(service) as server:
        server.context.metrics = ServeMetrics(server.context)
        yield server


@pytest.fixture
def server(open_server: RunningServer, service: EngineService) -> Iterator[RunningServer]:
    # Other servers of the same engine have come and gone.
    open_server.context.attach(service)
    yield open_server
    open_server.wait_idle()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox"], timeout=DEADLINE_MS
        )
        yield browser
        browser.close()


class Opened:
    """The page in a tab, what it complained about, and what it asked for."""

    def __init__(self, browser: Any, url: str, *, scheme: str = "light", width: int = 1200) -> None:
        self.url = url
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(DEADLINE_MS)
        self.troubles: list[str] = []
        self.requests: list[Any] = []
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.goto(url + "/")

    def wait_state(self, state: str) -> None:
        self.page.wait_for_selector(f"#state[data-state={state}]")

    def wait_true(self, script: str) -> None:
        """Wait until an expression holds; the page's policy keeps the browser from waiting by itself."""
        deadline = time.monotonic() + DEADLINE_MS / 1000
        while not self.page.evaluate(script):
            assert time.monotonic() < deadline, script
            self.page.wait_for_timeout(20)

    def ask(self, question: str) -> None:
        self.page.fill("#box", question)
        self.page.press("#box", "Enter")

    def wait_answer(self, number: int = 1) -> str:
        """Return the words of an answer that has ended."""
        self.page.wait_for_selector(f".answer[aria-busy=false] >> nth={number - 1}")
        return self.page.inner_text(f".answer .words >> nth={number - 1}")

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.post_data) for request in self.requests if request.url.endswith(CHAT)]

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def opened(browser: Any, server: RunningServer) -> Iterator[Opened]:
    """The page of a server, which must not complain nor ask anybody else."""
    opened = Opened(browser, server.url)
    opened.wait_state("ready")
    yield opened
    opened.close()
    assert opened.troubles == []
    assert all(request.url.startswith(server.url) for request in opened.requests)


def choose(opened: Opened, **values: object) -> None:
    for name, value in values.items():
        opened.page.fill(f"#{name}", str(value))


# The files.


def test_the_listed_files_are_those_there_are_and_are_packed() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*PAGE_FILES, "index.html"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["package-data"]["slipstream.serve"] == ["page/*"]


def test_the_page_has_a_strict_policy_and_nothing_inline(server: RunningServer) -> None:
    for path in PAGE_PATHS:
        answer = server.client.get(path)
        policy = dict(
            part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";")
        )
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
        # Nothing outside is named but the namespace of SVG and the specification that a comment cites.
        outside = set(re.findall(r"https?://[\w.]+", answer.text))
        assert outside <= {"http://www.w3.org", "https://html.spec.whatwg.org"}
    page = server.client.get("/").text
    assert not re.search(r"<style|<script(?![^>]* src=)|\son\w+=|\sstyle=|javascript:", page)
    scripts = "".join(server.client.get(f"/page/{name}").text for name in PAGE_FILES if name.endswith(".js"))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", scripts
    )


def test_a_file_that_the_browser_has_is_not_sent_again(server: RunningServer) -> None:
    for path in PAGE_PATHS:
        first = server.client.get(path)
        assert first.headers["cache-control"] == "no-cache"
        tag = first.headers["etag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}'):
            again = server.client.get(path, headers={"If-None-Match": known})
            assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == tag
        assert server.client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
        head = server.client.head(path)
        assert head.status_code == 200 and head.content == b"" and head.headers["etag"] == tag


def test_without_the_page_its_paths_are_like_any_other(service: EngineService) -> None:
    with serving(service, settings=ServeSettings(has_ui=False)) as server:
        for path in PAGE_PATHS:
            answer = server.client.get(path)
            assert answer.status_code == 404 and checked_error(answer)["code"] == "not_found"
    settings = ServeSettings(has_ui=False, api_keys=KEYED.api_keys)
    with serving(service, settings=settings) as server:
        assert {server.client.get(path).status_code for path in PAGE_PATHS} == {401}


def test_r16_the_files_are_open_and_what_they_ask_for_is_not(service: EngineService) -> None:
    with serving(service, settings=KEYED) as server:
        assert {server.client.get(path).status_code for path in PAGE_PATHS} == {200}
        for path in ("/page", "/page/", "//", "/page/index.html", "/page/%73cript.js", "/Page/script.js"):
            assert httpx.get(server.url + path).status_code == 401, path
        for path in ("/metrics", "/server_info", "/v1/models", "/trace"):
            assert server.client.get(path).status_code == 401


def test_the_docs_are_linked_where_they_are_served(service: EngineService) -> None:
    for has_docs in (False, True):
        with serving(service, settings=ServeSettings(has_docs=has_docs)) as server:
            assert ('href="/docs"' in server.client.get("/").text) is has_docs


# The page.


def test_an_answer_grows_and_says_what_it_took(opened: Opened, tmp_path: Path) -> None:
    choose(opened, seed=3, max_tokens=40)
    opened.ask("ba de\nba")
    growing = "document.querySelector('.answer .words')?.textContent.length"
    opened.wait_true(f"{growing} > 0")
    assert opened.page.get_attribute(".answer", "aria-busy") == "true"
    early = opened.page.evaluate(growing)
    opened.wait_true(f"{growing} > {early}")
    opened.wait_answer()
    figures = opened.page.inner_text(".figures")
    assert re.search(r"first token \d+ ms|first token [\d.]+ s", figures)
    assert re.search(r"[\d.]+ tokens/s +· +40 tokens +· +reached the length limit", figures), figures
    opened.ask("de")
    opened.wait_answer(2)
    first, second = opened.bodies()
    assert first["messages"] == [{"role": "user", "content": "ba de\nba"}]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert opened.page.inner_text("#spoken") == "The answer is complete."
    opened.page.screenshot(path=tmp_path / "answers.png")


def test_escape_stops_an_answer_and_the_engine(opened: Opened, server: RunningServer) -> None:
    for number, stop in ((1, "Escape"), (2, None)):
        opened.ask("ba")
        opened.wait_true(f"document.querySelectorAll('.answer .words')[{number - 1}]?.textContent.length > 3")
        opened.page.keyboard.press(stop) if stop else opened.page.click("#stop")
        assert opened.wait_answer(number)
        assert "stopped" in opened.page.inner_text(f".figures >> nth={number - 1}")
        server.wait_idle()
    assert opened.page.is_visible("#send") and not opened.page.is_visible("#stop")


def test_settings_reach_the_request_and_outlive_the_tab_but_the_key_does_not(opened: Opened) -> None:
    choose(opened, system="Be brief.", temperature=0.5, top_p=0.9, top_k=7, seed=11, max_tokens=3, key=KEY)
    opened.ask("ba")
    opened.wait_answer()
    [body] = opened.bodies()
    expected = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 11, "max_tokens": 3, "model": "tiny"}
    assert {name: body[name] for name in expected} == expected
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    kept = opened.page.evaluate("JSON.stringify({...localStorage})")
    assert "Be brief." in kept and KEY not in kept
    assert KEY in opened.page.evaluate("JSON.stringify({...sessionStorage})")
    other = opened.context.new_page()
    other.goto(opened.url + "/")
    other.wait_for_selector("#state[data-state=ready]")
    assert other.input_value("#top_k") == "7" and other.input_value("#key") == ""
    other.click("#reset")
    assert other.input_value("#top_k") == "" and "Be brief" not in other.evaluate(
        "JSON.stringify({...localStorage})"
    )


def test_a_setting_that_is_no_number_is_not_sent(opened: Opened) -> None:
    choose(opened, max_tokens=0)
    opened.ask("ba")
    opened.wait_true("document.getElementById('spoken').textContent.startsWith('Longest answer')")
    assert opened.bodies() == [] and opened.page.input_value("#box") == "ba"


def test_the_last_answer_is_asked_for_again_and_the_last_question_edited(opened: Opened) -> None:
    choose(opened, seed=5, max_tokens=4)
    opened.ask("ba")
    first = opened.wait_answer()
    opened.page.click("text=Answer again")
    opened.wait_true("document.querySelectorAll('.answer').length === 1")
    assert opened.wait_answer() == first, "the seed is the same"
    opened.page.click("text=Edit")
    assert opened.page.input_value("#box") == "ba"
    opened.ask("de de")
    opened.wait_answer()
    assert [body["messages"] for body in opened.bodies()][2] == [{"role": "user", "content": "de de"}]
    assert opened.page.locator(".question").count() == 1
    opened.page.click("#clear")
    assert opened.page.locator(".question").count() == 0 and opened.page.is_visible("#welcome")


def test_keys_of_the_box(opened: Opened) -> None:
    opened.page.focus("#clear, #reset")
    opened.page.keyboard.press("Control+k")
    assert opened.page.evaluate("document.activeElement.id") == "box"
    opened.page.keyboard.type("ba")
    opened.page.keyboard.press("Shift+Enter")
    opened.page.keyboard.type("de")
    assert opened.page.input_value("#box") == "ba\nde" and opened.bodies() == []


def test_every_control_has_a_name(opened: Opened) -> None:
    fields = "[...document.querySelectorAll('input, textarea, select')]"
    assert opened.page.evaluate(f"{fields}.filter((e) => !e.labels.length).map((e) => e.id)") == []
    empty = "[...document.querySelectorAll('button, a')].filter((e) => !e.textContent.trim()).length"
    assert opened.page.evaluate(empty) == 0


def test_the_strip_shows_what_the_metrics_say(opened: Opened) -> None:
    opened.ask("ba")
    opened.wait_true("document.getElementById('running').textContent === '1'")
    opened.wait_true("Number(document.getElementById('rate').textContent) > 0")
    opened.wait_true("document.querySelector('#spark .line').getAttribute('d')?.includes('L')")
    assert opened.page.inner_text("#waiting") == "0" and opened.page.inner_text("#kv").endswith("%")
    facts = opened.page.inner_text("#facts")
    assert "tiny" in facts and "cpu" in facts and "float32" in facts and "256 tokens of context" in facts
    opened.page.keyboard.press("Escape")
    opened.wait_state("ready")


def test_metrics_are_read_whatever_the_labels_hold(opened: Opened) -> None:
    text = (
        '# HELP slipstream:num_requests_running x\nslipstream:num_requests_running{model_name="a} 9 {b"} 2\n'
        'slipstream:num_requests_running{model_name="c"} 3\nslipstream:kv_cache_usage_perc 2.5e-01\nother 7\n'
    )
    script = "async (text) => (await import('/page/live.js')).readMetrics(text)"
    assert opened.page.evaluate(script, text) == {"running": 5, "kv": 0.25}


def test_a_key_is_asked_for_once_and_then_used(browser: Any, service: EngineService, tmp_path: Path) -> None:
    with serving(service, settings=KEYED) as server:
        server.context.metrics = ServeMetrics(server.context)
        opened = Opened(browser, server.url)
        opened.wait_state("key")
        opened.page.wait_for_selector("#key-dialog[open]")
        opened.page.screenshot(path=tmp_path / "key.png")
        opened.page.keyboard.press("Escape")
        choose(opened, max_tokens=3)
        opened.ask("ba")
        opened.page.wait_for_selector("#key-dialog[open]")
        opened.page.fill("#key-given", KEY)
        opened.page.keyboard.press("Enter")
        assert opened.wait_answer()
        opened.wait_state("ready")
        assert opened.page.locator(".notice.failed").count() == 0
        with opened.page.expect_download() as download:
            opened.page.click("#trace-link")
        assert download.value.suggested_filename == "slipstream-trace.html"
        assert KEY not in "".join(request.url for request in opened.requests)
        opened.close()


def test_a_full_server_says_when_to_try_again(opened: Opened) -> None:
    refusal = ApiError(429, "The queue is full.", code="queue_full")

    def refuse(route: Any) -> None:
        headers = {"Retry-After": "2", "Content-Type": "application/json"}
        route.fulfill(status=429, headers=headers, body=json.dumps(refusal.body()))

    opened.page.route("**" + CHAT, refuse, times=1)
    choose(opened, max_tokens=3)
    opened.ask("ba")
    opened.page.wait_for_selector(".notice.failed")
    assert re.search(r"The queue is full\. Try again in [12] s\.", opened.page.inner_text(".notice"))
    opened.page.wait_for_selector("text=Try again now.")
    opened.page.click(".notice button")
    opened.wait_true("document.querySelector('.answer .words').textContent.length > 0")
    opened.wait_answer()
    assert len(opened.bodies()) == 2
    opened.troubles[:] = [trouble for trouble in opened.troubles if "429" not in trouble]


def test_a_server_that_loads_is_waited_for(opened: Opened, server: RunningServer) -> None:
    server.context.refusal = ApiError(503, "The model is still loading.", code="loading")
    choose(opened, max_tokens=3)
    opened.ask("ba")
    opened.page.wait_for_selector("text=The question is sent again by itself.")
    assert opened.page.get_attribute(".answer", "aria-busy") == "true"
    server.context.refusal = None
    assert opened.wait_answer()
    assert not opened.page.is_visible(".notice")
    opened.troubles[:] = [trouble for trouble in opened.troubles if "503" not in trouble]


def test_a_refusal_says_what_is_wrong_and_keeps_the_question(opened: Opened) -> None:
    opened.ask("ba " * 400)
    opened.page.wait_for_selector(".notice.failed")
    told = opened.page.inner_text(".notice")
    assert "at most 255" in told and "Change the question or a setting" in told and "Try again" in told
    opened.page.click("text=Edit")
    assert opened.page.input_value("#box").startswith("ba ba")
    opened.troubles[:] = [trouble for trouble in opened.troubles if "400" not in trouble]


DRAW = """async ([text, size]) => {
  const { GrowingText } = await import("/page/markdown.js");
  const parent = document.createElement("div");
  document.body.append(parent);
  const growing = new GrowingText(parent);
  const start = performance.now();
  for (let at = 0; at < text.length; at += size) growing.append(text.slice(at, at + size));
  const took = performance.now() - start;
  const tags = [...new Set([...parent.querySelectorAll("*")].map((node) => node.localName))].sort();
  const names = [...parent.querySelectorAll("*")].flatMap((node) => node.getAttributeNames());
  const found = { html: parent.innerHTML.slice(0, 4000), tags, took };
  parent.remove();
  return { ...found, attributes: [...new Set(names)].sort() };
}"""
SAFE_TAGS = {
    *("p", "code", "pre", "figure", "figcaption", "button", "strong", "em", "ul", "ol", "li", "hr"),
    *("h3", "h4", "h5", "h6"),
}
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1)) ![y](http://evil.example/z)",
    "```<script>\nalert(1)</script>",
    '```js" onclick="x\nno end',
    "**<b>bold</b>** `<i>` *<u>* # <h1>\n\n# <svg onload=alert(1)>",
    "- <iframe src=//evil.example>\n  1. <a href=javascript:x>",
    "<style>*{display:none}</style>&lt;b&gt;\u2028\u202e\0",
]


def test_hostile_output_stays_text(opened: Opened) -> None:
    for text, size in itertools.product(HOSTILE, (1, 7, 1 << 20)):
        found = opened.page.evaluate(DRAW, [text, size])
        assert set(found["tags"]) <= SAFE_TAGS, found
        assert set(found["attributes"]) <= {"type", "class", "tabindex", "start"}, found
    assert opened.page.evaluate("document.title").endswith("Slipstream")


def test_the_subset_of_markdown(opened: Opened) -> None:
    text = (
        "# One\n\nA **bold** and *italic* `co*de` of snake_case_name, 2*3*4.\nnext\n\n- a\n  - b\n- c\n\n"
        "3. x\n4. y\n\n```python\nprint('<b>')\n```\n---\nunclosed **bold"
    )
    expected = (
        "<h3>One</h3><p>A <strong>bold</strong> and <em>italic</em> <code>co*de</code> of snake_case_name, "
        "2*3*4.\nnext</p><ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"
        '<ol start="3"><li>x</li><li>y</li></ol>'
    )
    for size in (1, 5, len(text)):
        html = opened.page.evaluate(DRAW, [text, size])["html"]
        assert html.startswith(expected), html
        assert "<pre tabindex=\"0\"><code>print('&lt;b&gt;')</code></pre>" in html
        assert html.endswith("<hr><p>unclosed **bold</p>"), html


MEGABYTE = 1 << 20
LONG = {
    "one line": "a" * MEGABYTE,
    "marks": "*a **b `c " * (MEGABYTE // 10),
    "openings": "**a " * (MEGABYTE // 4),
    "backticks": "".join("`" * (i % 700 + 1) + "a" for i in range(3000)),
    "spaces": "-" + " " * MEGABYTE + "\u2028",
    "rules": ("- " * 500 + "x\n") * 1000,
    "open fence": "```\n" + "x\n" * (MEGABYTE // 2),
    "nested": "".join(" " * (i % 60) + "- a\n" for i in range(30_000)),
}


def test_a_megabyte_is_drawn_in_linear_time(opened: Opened) -> None:
    # Quadratic work on a megabyte takes minutes; what is linear, some tenths of a second.
    for name, text in LONG.items():
        found = opened.page.evaluate(DRAW, [text, MEGABYTE * 2])
        assert set(found["tags"]) <= SAFE_TAGS and found["took"] < 20_000, (name, found["took"])


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390)])
def test_the_page_fits_and_keeps_to_the_scheme(
    browser: Any, server: RunningServer, tmp_path: Path, scheme: str, width: int
) -> None:
    opened = Opened(browser, server.url, scheme=scheme, width=width)
    opened.wait_state("ready")
    red = opened.page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    assert (red < 60) is (scheme == "dark")
    is_phone = width < 640
    assert opened.page.is_visible("#settings") is not is_phone
    if is_phone:
        opened.page.click("#settings-toggle")
        assert opened.page.is_visible("#settings")
        choose(opened, max_tokens=5)
        opened.page.screenshot(path=tmp_path / "drawer.png")
        opened.page.keyboard.press("Escape")
        assert not opened.page.is_visible("#settings")
    choose(opened, box="ba")
    opened.page.click("#send")
    opened.page.wait_for_selector(".answer .words >> nth=0")
    opened.page.screenshot(path=tmp_path / "page.png")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.page.keyboard.press("Escape")
    opened.wait_answer()
    opened.close()
    assert opened.troubles == []
