"""Does `slipstream run` put the answer, and only the answer, on standard output, and end cleanly?"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from slipstream.cli.run import stream
from slipstream.core.errors import RequestError
from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.generation import Generation
from slipstream.llm import LLM
from tests.cli.conftest import ROOT, Slipstream, run_process, smollm2_text

PROMPT = "The capital of France is"


def chat_text(llm: LLM, *messages: tuple[str, str], **params: Any) -> str:
    listed = [{"role": role, "content": content} for role, content in messages]
    return llm.chat(listed, SamplingParams(**params)).outputs[0].text


def test_answer_is_the_librarys(slipstream: Slipstream, tiny_path: str, tiny_llm: LLM) -> None:
    answered = slipstream("run", tiny_path, "hello", "--max-tokens", 12)
    assert answered.code == 0
    assert answered.out == chat_text(tiny_llm, ("user", "hello"), max_tokens=12) + "\n"
    lines = answered.err.splitlines()
    assert any("float32" in line for line in lines) and any("ready in" in line for line in lines)
    for figure in ("12 tokens", "tokens/s", "first token after", "peak memory"):
        assert figure in lines[-1]


def test_quiet_shows_the_answer_alone(slipstream: Slipstream, tiny_path: str) -> None:
    quiet = slipstream("run", tiny_path, "hello", "--max-tokens", 4, "--quiet")
    assert (quiet.code, quiet.err) == (0, "")
    assert quiet.out == slipstream("run", tiny_path, "hello", "--max-tokens", 4).out


def test_system_message_changes_the_prompt(slipstream: Slipstream, tiny_path: str, tiny_llm: LLM) -> None:
    answered = slipstream("run", tiny_path, "hello", "--system", "be brief", "--max-tokens", 12)
    expected = chat_text(tiny_llm, ("system", "be brief"), ("user", "hello"), max_tokens=12)
    assert answered.out == expected + "\n"
    assert expected != chat_text(tiny_llm, ("user", "hello"), max_tokens=12)


def test_raw_uses_no_template(slipstream: Slipstream, tiny_path: str, tiny_llm: LLM) -> None:
    answered = slipstream("run", tiny_path, "hello", "--raw", "--max-tokens", 12)
    expected = tiny_llm.generate("hello", SamplingParams(max_tokens=12)).outputs[0].text
    assert answered.out == expected + "\n"
    assert expected != chat_text(tiny_llm, ("user", "hello"), max_tokens=12)


def test_raw_ends_after_128_tokens(slipstream: Slipstream, tiny_path: str) -> None:
    assert "128 tokens (ended by length)" in slipstream("run", tiny_path, "x", "--raw", "--ignore-eos").err


def test_raw_ends_with_the_context(slipstream: Slipstream, tiny_path: str) -> None:
    ended = slipstream("run", tiny_path, "x" * 20, "--raw", "--ignore-eos", "--max-seq-len", 32)
    assert "12 tokens (ended by length)" in ended.err


def test_chat_fills_the_context(slipstream: Slipstream, tiny_path: str, tiny_llm: LLM) -> None:
    ended = slipstream("run", tiny_path, "x", "--ignore-eos", "--max-seq-len", 96)
    num_prompt = len(tiny_llm.chat([{"role": "user", "content": "x"}]).prompt_token_ids)
    assert f"{96 - num_prompt} tokens (ended by length)" in ended.err


def test_a_model_without_template_continues_the_prompt(slipstream: Slipstream, untemplated_path: str) -> None:
    answered = slipstream("run", untemplated_path, "hello", "--max-tokens", 8)
    assert "no chat template" in answered.err
    raw = slipstream("run", untemplated_path, "hello", "--raw", "--max-tokens", 8)
    assert answered.out == raw.out and "no chat template" not in raw.err
    refused = slipstream("run", untemplated_path, "hello", "--system", "s")
    assert refused.code == 1 and "--system was given" in refused.err


@pytest.mark.parametrize("place", [["-"], []])
def test_prompt_from_standard_input(
    slipstream: Slipstream, tiny_path: str, tiny_llm: LLM, place: list[str]
) -> None:
    """One line end is taken off, as a shell's own substitution does; what stands before it is kept."""
    answered = slipstream("run", tiny_path, *place, "--max-tokens", 8, stdin="two\nlines\n\r\n")
    assert answered.out == chat_text(tiny_llm, ("user", "two\nlines\n"), max_tokens=8) + "\n"


@pytest.mark.parametrize(
    ("stdin", "options", "said"),
    [
        (b"", ["--raw"], "prompt is empty"),
        (b"\xff\xfe", [], "not UTF-8"),
        (b"x", ["--temperature", "-1"], "temperature must be"),
        (b"x", ["--max-tokens", "64k"], "max_tokens is 65536"),
        (b"x", ["--max-seq-len", "1"], "max_seq_len=1"),
        (b"x", ["--dtype", "flaot32"], "Did you mean 'float32'?"),
        (b"x", ["--kv-cache-max-bytes", "1"], "KV cache needs at least"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    slipstream: Slipstream, tiny_path: str, stdin: bytes, options: list[str], said: str
) -> None:
    refused = slipstream("run", tiny_path, "-", "-q", *options, stdin=stdin)
    assert refused.code == 1 and refused.out == ""
    assert said in refused.err and refused.err.startswith("Error: ") and refused.err.count("\n") == 1


def test_a_terminal_without_prompt_is_told_so(
    slipstream: Slipstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slipstream.cli.run.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    refused = slipstream("run", "m")
    assert refused.code == 2 and "PROMPT is missing" in refused.err


def test_sampling_options_reach_the_sampler(slipstream: Slipstream, tiny_path: str) -> None:
    def answer(*options: object) -> str:
        asked = ("run", tiny_path, "hello", "--raw", "-q", "--max-tokens", 24, "--ignore-eos")
        return slipstream(*asked, *options).out

    greedy = answer()
    drawn = answer("--temperature", 2, "--seed", 1)
    assert drawn == answer("--temperature", 2, "--seed", 1)
    assert len({greedy, drawn, answer("--temperature", 2, "--seed", 2)}) == 3
    assert answer("--temperature", 2, "--seed", 1, "--top-k", 1) == greedy
    stop = greedy[5]
    assert answer("--stop", stop) == greedy[: greedy.index(stop)] + "\n"


def output_of(text_diff: str, *, error: RequestError | None = None, finished: bool = False) -> RequestOutput:
    sample = CompletionOutput(0, text_diff=text_diff)
    return RequestOutput("r", None, [1], [sample], finished=finished, error=error)


def test_whatever_interrupts_the_writing_aborts_the_request() -> None:
    aborted: list[str] = []
    generation = Generation("r", aborted.append)
    generation.put(output_of("a"))

    def write(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        stream(generation, write)
    assert aborted and set(aborted) == {"r"}


def test_an_answer_that_fails_keeps_what_was_shown_and_raises() -> None:
    generation = Generation("r", lambda request_id: None)
    generation.put(output_of("a"))
    generation.put(output_of("b", error=RequestError("it broke"), finished=True))
    shown: list[str] = []
    with pytest.raises(RequestError, match="it broke"):
        stream(generation, shown.append)
    assert shown == ["a", "b"]


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command that heeds Ctrl-C, also where this test runs in the background and ignores it."""
    return subprocess.Popen(
        [sys.executable, "-m", "slipstream", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def test_ctrl_c_ends_a_generation_and_leaves_nothing(tiny_path: str) -> None:
    process = start(
        "run", tiny_path, "hello", "--ignore-eos", "--temperature", "1", "--kv-cache-max-tokens", "16k"
    )
    assert process.stdout is not None
    try:
        first = process.stdout.read(1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        rest, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert first and b"Traceback" not in err and b"Error" not in err
    # Sixteen thousand tokens take much longer than the second or two that a loaded machine may take to stop.
    assert time.monotonic() - started < 30 and len(rest) < 16_000
    # The chat template was rendered in a child, which is gone.
    assert children
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_a_closed_pipe_ends_quietly(tiny_path: str) -> None:
    process = start("run", tiny_path, "hello", "--ignore-eos", "-q", "--max-tokens", "8000")
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 141
    finally:
        process.kill()
    assert err == b""


def test_smollm2_answers_as_the_reference(smollm2_path: Path, reference_cases: list[dict[str, Any]]) -> None:
    """End to end, as a user types it: real weights, a process, and only the answer on standard output."""
    case = next(
        case
        for case in reference_cases
        if case["mode"] == "raw" and case["prompt"] == PROMPT and case["model"] == smollm2_path.stem
    )
    expected = smollm2_text(smollm2_path, case["output_token_ids"][:12])
    assert expected.startswith(" Paris.")
    finished = run_process("run", smollm2_path, PROMPT, "--raw", "--max-tokens", 12, "--dtype", "float32")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == expected + "\n"
    assert "Traceback" not in finished.stderr and "tokens/s" in finished.stderr.splitlines()[-1]
