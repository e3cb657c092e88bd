"""Does an LLM leave nothing behind, however it ends, and does no file of a model ever run as code?"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from slipstream import LLM, SamplingParams
from slipstream.core.errors import ConfigError, EngineError
from tests.engine.tiny import prompt_ids, tiny_llama, write_folder

ROOT = Path(__file__).resolve().parent.parent
# Catches a hang only.
DEADLINE_S = 60.0
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_seq_len": 256}
LONG = SamplingParams(max_tokens=200, ignore_eos=True)
MESSAGES = [{"role": "user", "content": "ba de"}]
MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tiny_llama(), tmp_path_factory.mktemp("model"))


def footprint() -> tuple[int, int, int]:
    """Return the numbers of threads, open files and child processes."""
    process = psutil.Process()
    return threading.active_count(), process.num_fds(), len(process.children(recursive=True))


def use(folder: Path) -> None:
    with LLM(folder, **OPTIONS) as llm:
        assert llm.chat(MESSAGES, SamplingParams(max_tokens=4)).error is None
        llm.generate_async(prompt_ids(20, seed=1), LONG)


def test_twenty_lives_leave_nothing_behind(folder: Path) -> None:
    """Each ends with a request running and a template's process started."""
    for _ in range(3):
        use(folder)  # what is allocated once: thread pools, arenas, caches of compiled templates
    before, resident = footprint(), psutil.Process().memory_info().rss
    for _ in range(20):
        use(folder)
    assert footprint() == before
    # A life leaked would be 2.9 MB (its pages and rows that were touched, weights, tokenizer): 58 MB in all.
    # What an allocator keeps back varies by a few.
    assert psutil.Process().memory_info().rss - resident < 20 * MIB


def test_an_llm_that_goes_out_of_scope_leaves_nothing_behind(folder: Path) -> None:
    def fail() -> None:
        llm = LLM(folder, **OPTIONS)
        llm.chat(MESSAGES, SamplingParams(max_tokens=2))
        llm.generate_async(prompt_ids(20, seed=1), LONG)
        raise KeyError("the function's own")

    use(folder)
    before = footprint()
    # `pytest.raises` would keep the frame, and so the LLM.
    try:
        fail()
    except KeyError:
        failed = True
    assert failed and footprint() == before


def test_a_refused_start_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    use(folder)
    before = footprint()
    for options in ({"max_seq_len": 10**6}, {"tokenizer": broken / "nowhere"}):
        with pytest.raises(Exception, match=r"\w"):
            LLM(folder, **(OPTIONS | options))
    with pytest.raises(Exception, match=r"model\.safetensors"):
        LLM(broken, **OPTIONS)
    assert footprint() == before


def test_two_engines_answer_at_the_same_time(folder: Path) -> None:
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    prompts = [prompt_ids(20 + i, seed=i) for i in range(3)]
    with LLM(folder, **OPTIONS) as first, LLM(folder, **OPTIONS, max_num_tokens=32) as second:
        expected = [output.outputs[0].token_ids for output in first.generate(prompts, params)]
        running = [llm.generate_async(p, params) for p in prompts for llm in (first, second)]
        given = [generation.result(DEADLINE_S).outputs[0].token_ids for generation in running]
    assert given[::2] == expected and given[1::2] == expected


def test_no_signal_handler_is_changed(folder: Path) -> None:
    numbers = [number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)]
    before = {number: signal.getsignal(number) for number in numbers}
    with LLM(folder, **OPTIONS) as llm:
        llm.chat(MESSAGES, SamplingParams(max_tokens=2))
        assert {number: signal.getsignal(number) for number in numbers} == before
    assert {number: signal.getsignal(number) for number in numbers} == before


CTRL_C = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import psutil
from slipstream import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", dtype="float32", max_seq_len=256)
llm.chat([{"role": "user", "content": "ba de"}], SamplingParams(max_tokens=2))
prompts = [[40 + i, 50] for i in range(60)]
try:
    print("generating", flush=True)
    while True:
        llm.generate(prompts, SamplingParams(max_tokens=200, ignore_eos=True))
except KeyboardInterrupt:
    pass
# The batch was given up at once, and the engine serves the next caller.
deadline = time.monotonic() + 30
while (stats := llm.get_stats())["num_running"] + stats["num_waiting"]:
    assert time.monotonic() < deadline
    time.sleep(0.01)
assert stats["finish_reasons"]["cancelled"] > 0, stats
assert llm.generate([40, 50], SamplingParams(max_tokens=2)).error is None
llm.shutdown()
assert threading.active_count() == 1, threading.enumerate()
assert not psutil.Process().children()
print("whole", flush=True)
"""


def test_ctrl_c_gives_a_batch_up_and_keeps_the_engine(folder: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CTRL_C, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "generating"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=DEADLINE_S)
    finally:
        child.kill()
    assert out.strip() == "whole" and child.returncode == 0, err


def fork_and_use(llm: LLM, answers: Any) -> None:
    try:
        llm.generate([5, 6], SamplingParams(max_tokens=2))
        answers.put("answered")
    except EngineError as error:
        answers.put(str(error))


def test_a_forked_child_is_told_that_the_engine_stayed_behind(folder: Path) -> None:
    """Threads do not survive a fork: without a check, the child would wait for ever."""
    context = multiprocessing.get_context("fork")
    with LLM(folder, **OPTIONS) as llm:
        answers = context.Queue()
        child = context.Process(target=fork_and_use, args=(llm, answers))
        child.start()
        assert "forked" in answers.get(timeout=DEADLINE_S)
        child.join(DEADLINE_S)
        assert child.exitcode == 0
        assert llm.generate([5, 6], SamplingParams(max_tokens=2)).error is None


PAYLOAD = "from pathlib import Path\nPath({marker!r}).write_text('ran')\n"
AUTO_MAPS = {
    "config.json": {"AutoConfig": "payload.Config", "AutoModelForCausalLM": "payload.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["payload.Tokenizer", None]},
    "generation_config.json": {"GenerationConfig": "payload.Settings"},
}


@pytest.mark.parametrize("load_format", ["auto", "safetensors", "dummy"])
def test_no_code_of_a_repository_runs(folder: Path, tmp_path: Path, load_format: str) -> None:
    """Payloads stand wherever some loader would look for code; one that ran would leave a marker."""
    marker = tmp_path / "marker"
    model = shutil.copytree(folder, tmp_path / "model")
    for name in ("payload", "modeling_llama", "configuration_llama", "tokenization_llama", "__init__"):
        (model / f"{name}.py").write_text(PAYLOAD.format(marker=str(marker)))
    for name, auto_map in AUTO_MAPS.items():
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    custom = shutil.copytree(folder, tmp_path / "custom" / "generate")
    (custom / "generate.py").write_text(PAYLOAD.format(marker=str(marker)))
    shutil.copytree(custom, model / "custom_generate")
    with LLM(model, **OPTIONS, load_format=load_format) as llm:
        assert llm.chat(MESSAGES, SamplingParams(max_tokens=2)).error is None
        llm.update_weights(folder)
        llm.update_weights(model)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        LLM(model, **OPTIONS, trust_remote_code=True)
    assert not marker.exists()
    # The payload does what the test believes it does.
    subprocess.run([sys.executable, str(model / "payload.py")], check=True, env=dict(os.environ))
    assert marker.exists()
