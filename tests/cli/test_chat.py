"""Can one hold a chat through a pipe and on a terminal, and leave it, whatever is pressed?"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from slipstream.cli.chat import Repl, read_line
from slipstream.core.sampling_params import SamplingParams
from slipstream.llm import LLM
from tests.cli.conftest import ROOT, Slipstream, smollm2_text

BRIEF = ("--max-tokens", 6, "--ignore-eos")


def figures(err: str) -> list[str]:
    return re.findall(r"^\[(.*)\]$", err, re.MULTILINE)


def test_every_line_of_a_pipe_is_a_turn(slipstream: Slipstream, tiny_path: str, tiny_llm: LLM) -> None:
    chatted = slipstream("chat", tiny_path, *BRIEF, stdin="hello\n\nand you?")
    assert chatted.code == 0
    messages: list[dict[str, str]] = []
    expected = ""
    for question in ("hello", "and you?"):
        messages.append({"role": "user", "content": question})
        text = tiny_llm.chat(messages, SamplingParams(max_tokens=6, ignore_eos=True)).outputs[0].text
        messages.append({"role": "assistant", "content": text})
        expected += text + "\n"
    assert chatted.out == expected
    assert len(figures(chatted.err)) == 2 and "prompt tokens cached" in figures(chatted.err)[1]


def test_later_turns_show_their_cached_tokens(slipstream: Slipstream, tiny_path: str) -> None:
    chatted = slipstream("chat", tiny_path, *BRIEF, stdin="a long first question " * 10 + "\nmore\n")
    counts = [int(re.findall(r"(\d+) of \d+ prompt tokens cached", line)[0]) for line in figures(chatted.err)]
    assert counts[0] == 0 and counts[1] > 200


def test_quiet_shows_the_answers_alone(slipstream: Slipstream, tiny_path: str) -> None:
    quiet = slipstream("chat", tiny_path, *BRIEF, "-q", stdin="hello\n")
    assert (quiet.code, quiet.err) == (0, "")
    assert quiet.out == slipstream("chat", tiny_path, *BRIEF, stdin="hello\n").out


def test_commands_write_nothing_to_standard_output(slipstream: Slipstream, tiny_path: str) -> None:
    commands = "/help\n/stats\n/system\n/system be kind\n/system\n/rest\n/reset now\n/exit\nnever asked\n"
    chatted = slipstream("chat", tiny_path, *BRIEF, stdin=commands)
    assert (chatted.code, chatted.out) == (0, "")
    for said in (
        "/reset        forget",
        "executed_tokens: 0",
        "The system message is None",
        "The system message is 'be kind'",
        "Did you mean '/reset'?",
        "a new conversation\n",
    ):
        assert said in chatted.err


def test_reset_and_system_change_what_is_asked(slipstream: Slipstream, tiny_path: str) -> None:
    plain = slipstream("run", tiny_path, "-q", *BRIEF, stdin="hello").out
    kind = slipstream("run", tiny_path, "-q", *BRIEF, "--system", "be kind", stdin="hello").out
    chatted = slipstream(
        "chat", tiny_path, "-q", *BRIEF, stdin="hello\n/reset\nhello\n/system be kind\nhello"
    )
    assert chatted.out == plain + plain + kind
    assert plain != kind


def test_a_doubled_slash_is_text(slipstream: Slipstream, tiny_path: str) -> None:
    asked = slipstream("chat", tiny_path, "-q", *BRIEF, stdin="//help me\n")
    assert asked.out == slipstream("run", tiny_path, "-q", *BRIEF, stdin="/help me").out


def test_a_full_context_is_explained_and_the_chat_goes_on(slipstream: Slipstream, tiny_path: str) -> None:
    lines = "x" * 300 + "\nhello\n"
    chatted = slipstream("chat", tiny_path, *BRIEF, "--max-seq-len", 128, stdin=lines)
    # A pipe's exit code says that a turn failed; the turns after it were answered.
    assert chatted.code == 1
    assert "no longer fits the context of 128 tokens" in chatted.err and "/reset" in chatted.err
    assert len(figures(chatted.err)) == 1
    assert chatted.out == slipstream("run", tiny_path, "-q", *BRIEF, stdin="hello").out


def test_an_answer_that_fills_the_context_says_so(slipstream: Slipstream, tiny_path: str) -> None:
    chatted = slipstream("chat", tiny_path, "--ignore-eos", "--max-seq-len", 96, stdin="hello\n")
    assert chatted.code == 0
    assert "The context of 96 tokens is full" in chatted.err


def test_a_model_without_template_cannot_chat(slipstream: Slipstream, untemplated_path: str) -> None:
    refused = slipstream("chat", untemplated_path, stdin="hello\n")
    assert refused.code == 1 and "run --raw" in refused.err and refused.out == ""


@pytest.mark.parametrize("presses", [["ctrl-d"], ["ctrl-c", "ctrl-c"], ["ctrl-c", "ctrl-d"]])
def test_keys_that_leave_at_the_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], presses: list[str]
) -> None:
    pressed = iter(presses)

    def press(prompt: str) -> str:
        raise EOFError if next(pressed) == "ctrl-d" else KeyboardInterrupt

    on_a_terminal(monkeypatch, press)
    Repl(UNUSED, UNUSED, is_quiet=True).run()
    assert next(pressed, None) is None
    assert capsys.readouterr().out == ""


def test_a_line_between_two_ctrl_c_forgets_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([KeyboardInterrupt(), "/help", KeyboardInterrupt(), "/exit"])

    def press(prompt: str) -> str:
        answer = next(answers)
        if isinstance(answer, KeyboardInterrupt):
            raise answer
        return answer

    on_a_terminal(monkeypatch, press)
    Repl(UNUSED, UNUSED, is_quiet=True).run()
    assert next(answers, None) is None


UNUSED: Any = None


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str]) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", answer)


def test_the_prompt_stays_out_of_a_redirected_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: "hello\n"))
    assert read_line(is_terminal=True) == "hello"
    assert capsys.readouterr() == ("", ">>> ")


posix = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")


class Terminal:
    """A chat on a pseudo-terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        import fcntl
        import pty
        import termios

        self._keyboard, screen = pty.openpty()

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "slipstream", *arguments],
            cwd=ROOT,
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
            preexec_fn=take_terminal,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(screen)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def wait_for(self, text: str, *, timeout_s: float = 60.0) -> str:
        """Read until `text` shows, forget it and what stands before it, and return that."""
        import select

        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._keyboard], [], [], max(0.0, left))
            assert ready, f"{text!r} did not show; the screen: {self.shown[-2000:]!r}"
            self.shown += os.read(self._keyboard, 65536).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until `text` shows.

        Python sees a signal that comes between drawing the prompt and waiting for a key only at the next key,
        so a press quicker than any hand may have to be repeated.
        """
        for _ in range(20):
            self.type("\x03")
            try:
                self.wait_for(text, timeout_s=3.0)
            except AssertionError:
                continue
            return
        raise AssertionError(f"{text!r} did not show after 20 times Ctrl-C; the screen: {self.shown!r}")

    def wait_for_end(self, *, timeout_s: float = 60.0) -> int:
        """Keep reading, or the screen's buffer fills up, until the process ends; return its exit code."""
        import select

        deadline = time.monotonic() + timeout_s
        try:
            while time.monotonic() < deadline:
                ready, _, _ = select.select([self._keyboard], [], [], 3.0)
                if not ready:
                    self.type("\x03")
                elif data := os.read(self._keyboard, 65536):
                    self.shown += data.decode(errors="replace")
                else:
                    break
        except OSError:  # how Linux says that the other side is closed
            pass
        return self.process.wait(timeout=30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keyboard)


@pytest.fixture
def terminal(tiny_path: str) -> Iterator[Terminal]:
    terminal = Terminal("chat", tiny_path, "--ignore-eos")
    yield terminal
    terminal.close()


@posix
def test_ctrl_c_stops_the_answer_then_twice_leaves(terminal: Terminal) -> None:
    terminal.wait_for(">>> ")
    terminal.type("hello\n")
    terminal.wait_for("hello\r\n")
    # Some of the answer shows; thousands of tokens are left of it.
    while not terminal.shown:
        terminal.shown += os.read(terminal._keyboard, 1).decode(errors="replace")
    children = psutil.Process(terminal.process.pid).children(recursive=True)
    terminal.type("\x03")
    terminal.wait_for("[stopped]")
    terminal.wait_for(">>> ")
    terminal.type("/stats\n")
    # The stopped answer stays in the conversation, and no request runs on.
    assert "num_running: 0" in terminal.wait_for("num_waiting: 0")
    terminal.wait_for(">>> ")
    terminal.interrupt("Ctrl-C again")
    terminal.wait_for(">>> ")
    terminal.type("\x03")
    assert terminal.wait_for_end() == 0
    assert "Traceback" not in terminal.shown
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children and alive == []


def test_smollm2_chats(
    slipstream: Slipstream, smollm2_path: Path, reference_cases: list[dict[str, Any]]
) -> None:
    """End to end: real weights, two turns, the reference's answer, and nothing else on standard output."""
    case = next(
        case for case in reference_cases if case["mode"] == "chat" and case["model"] == smollm2_path.stem
    )
    finished = slipstream(
        "chat", smollm2_path, "--max-tokens", 12, stdin=f"{case['prompt']}\nAnd of Italy?\n"
    )
    assert finished.code == 0, finished.err
    first, second = figures(finished.err)
    assert f"of {len(case['prompt_token_ids'])} prompt tokens" in first
    cached = re.findall(r"(\d+) of (\d+) prompt tokens cached", second)[0]
    # Whole blocks of 32: nearly all of the first turn's prompt and answer.
    assert 32 <= int(cached[0]) < int(cached[1])
    expected = smollm2_text(smollm2_path, case["output_token_ids"][:12])
    assert finished.out.startswith(expected + "\n") and finished.out.endswith("\n")
    assert ">>>" not in finished.out and "tokens/s" not in finished.out
