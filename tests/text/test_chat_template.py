"""Chat templates: what they may use, and that hostile ones end as one request's error, no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from slipstream.core.errors import RequestError
from slipstream.text.chat_template import MAX_SOURCE_CHARS, ChatTemplate
from slipstream.text.template_process import child_environment
from slipstream.text.tokenizer import FastTokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def make() -> Iterator[Any]:
    """Make templates that are closed, and whose processes are gone, after the test."""
    made: list[ChatTemplate] = []

    def build(source: str, **options: Any) -> ChatTemplate:
        made.append(ChatTemplate(source, **options))
        return made[-1]

    yield build
    pids = [template._process.pid for template in made]
    for template in made:
        template.close()
    assert not [pid for pid in pids if pid is not None and psutil.pid_exists(pid)]


def render(template: ChatTemplate, **options: Any) -> str:
    return template.render(MESSAGES, **options)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_references_are_rendered_letter_by_letter(
    make: Any, smollm2: FastTokenizer, reference_cases: list[dict[str, Any]]
) -> None:
    template = make(smollm2.chat_template, special_tokens=smollm2.special_tokens)
    chats = [case for case in reference_cases if case["mode"] == "chat"]
    assert len(chats) >= 4
    for case in chats:
        assert template.render([{"role": "user", "content": case["prompt"]}]) == case["rendered_prompt"]


RENDERED: list[tuple[str, dict[str, Any], str]] = [
    ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", {}, "<s>hi"),
    ("{% for m in messages %}\n    {% if true %}\nx\n    {% endif %}\n{% endfor %}", {}, "x\n"),
    ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}, "01"),
    ("{{ {'a': '<é>'}|tojson }}", {}, '{"a": "<é>"}'),
    ("{{ {'b': 1, 'a': 2}|tojson(indent=1) }}", {}, '{\n "b": 1,\n "a": 2\n}'),
    ("{% generation %}a{% endgeneration %}", {}, "a"),
    ("{{ strftime_now('%Y')|length }}", {}, "4"),
    (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        {},
        "1",
    ),
    ("{{ add_generation_prompt }}", {"add_generation_prompt": False}, "False"),
    ("{{ tools[0].name }}{{ thinking }}", {"tools": [{"name": "f"}], "thinking": True}, "fTrue"),
    ("{{ tools is none }}", {}, "True"),
    ("{{ messages[0].content }} 日本 \U0001f600", {}, "hi 日本 \U0001f600"),
]


@pytest.mark.parametrize(("source", "options", "expected"), RENDERED)
def test_what_templates_use(make: Any, source: str, options: dict[str, Any], expected: str) -> None:
    assert render(make(source, special_tokens={"bos_token": "<s>"}), **options) == expected


def test_rendering_equals_transformers(make: Any) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{{ bos_token }}{%- for m in messages -%}\n  {% if m.role == 'user' %}\n[{{ m.content | trim }}]\n"
        "  {%- else -%} {{ m | tojson }} {% endif %}\n{% endfor %}\n"
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    )
    messages = [{"role": "user", "content": " ä <b> "}, {"role": "assistant", "content": "ok\n"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": [1, None, True]}}}]
    rendered, _ = render_jinja_template([messages], tools=tools, chat_template=source, bos_token="<s>")
    assert make(source, special_tokens={"bos_token": "<s>"}).render(messages, tools=tools) == rendered[0]


HOSTILE = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "did not finish within",
    "{{ 'a' * 10**10 }}": "memory",
    # On a busy machine the deadline may come first.
    "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x=n.x*2 %}{% endfor %}": "memory|within",
    "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}": "more than 4,194,304 characters",
    "{{ 9 ** (9 ** 9) }}": "did not finish within",
    "{{ raise_exception.__globals__ }}": "out of bounds",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "out of bounds",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "out of bounds",
    "{{ '{0.__class__}'.format(messages) }}": "out of bounds",
    "{{ messages.append(1) }}": "out of bounds",
    "{{ range(10**9)|list }}": "range",
    "{{": "unexpected",
    "{% include '/etc/passwd' %}": "loader",
    "{{ missing.attribute }}": "undefined",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "nested too deeply",
}


@pytest.mark.parametrize("source", HOSTILE, ids=[source[:30] for source in HOSTILE])
def test_a_failing_template_is_one_requests_error(make: Any, source: str) -> None:
    template = make(source, deadline_s=1.0)
    start = time.monotonic()
    with pytest.raises(RequestError, match=HOSTILE[source]) as caught:
        render(template)
    assert caught.value.code == "template_error"
    assert time.monotonic() - start < 30  # a hang would reach the suite's limit


def test_a_killed_child_is_reaped_and_replaced(make: Any) -> None:
    source = "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    template = make(source + "{% endfor %}{% endfor %}{% endif %}fine", deadline_s=1.0)
    assert render(template) == "fine"
    pid = template._process.pid
    with pytest.raises(RequestError, match="did not finish"):
        template.render([{"role": "user", "content": "loop"}])
    assert template._process.pid is None and not psutil.pid_exists(pid)
    assert render(template) == "fine"
    assert template._process.pid != pid


def test_a_child_that_somebody_killed_is_replaced(make: Any) -> None:
    template = make("{{ messages[0].content }}")
    render(template)
    child = template._process._child
    os.kill(child.process.pid, signal.SIGKILL)
    wait_until(lambda: not child.is_usable())
    assert render(template) == "hi"
    assert template._process.pid != child.process.pid


def test_one_child_serves_all_renderings(make: Any) -> None:
    template = make("{{ messages[0].content }}")
    assert template._process.pid is None, "started before it was needed"
    pids = {(render(template), template._process.pid) for _ in range(20)}
    assert len(pids) == 1


def test_threads_take_turns(make: Any) -> None:
    template = make("{{ messages[0].content }}")
    answers: dict[int, str] = {}

    def work(start: int) -> None:
        for i in range(start, 60, 6):
            answers[i] = template.render([{"role": "user", "content": str(i)}])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: str(i) for i in range(60)}


def test_long_messages_go_through_the_pipe(make: Any) -> None:
    content = "日" * 300_000
    assert make("{{ messages[0].content }}").render([{"role": "user", "content": content}]) == content


def test_losing_the_template_ends_its_child() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    render(template)
    child = psutil.Process(template._process.pid)
    del template
    wait_until(lambda: not child.is_running())


@pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups of POSIX")
@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_the_child_does_not_outlive_its_parent(ending: str) -> None:
    script = (
        "import os, signal, sys, time\nfrom slipstream.text.chat_template import ChatTemplate\n"
        "t = ChatTemplate('x')\nt.render([{'role': 'user', 'content': 'a'}])\n"
        "print(t._process.pid, flush=True)\n"
        + ("" if ending == "exit" else "os.kill(os.getpid(), signal.SIGKILL)\n")
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    pid = int(done.stdout)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_is_left_to_the_parent(make: Any) -> None:
    template = make("{{ messages[0].content }}")
    render(template)
    pid = template._process.pid
    os.kill(pid, signal.SIGINT)
    assert render(template) == "hi" and template._process.pid == pid
    assert os.getsid(pid) != os.getsid(0), "a terminal's Ctrl-C would reach it"


def test_secrets_of_the_environment_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    assert "secret" not in child_environment().values()
    assert not {"SOME_API_KEY", "HOME"} & child_environment().keys()


def test_reserved_variables_cannot_be_set(make: Any) -> None:
    template = make("x", special_tokens={"image_token": "<i>"})
    for name in ("chat_template", "tokenize", "bos_token", "raise_exception", "image_token"):
        with pytest.raises(RequestError, match=f"{name!r} cannot be set"):
            render(template, **{name: "y"})
    assert template._process.pid is None


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}])
def test_only_plain_data_reach_a_template(make: Any, value: Any) -> None:
    with pytest.raises(RequestError, match="plain JSON data"):
        render(make("x"), extra=value)


def test_a_huge_source_is_refused(make: Any) -> None:
    with pytest.raises(RequestError, match="at most 1,048,576 are allowed"):
        render(make("x" * (MAX_SOURCE_CHARS + 1)))
