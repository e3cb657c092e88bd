"""Does every way to end a command end it with one clear line and the right exit code?"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import slipstream as package
from slipstream.cli import main as main_module
from slipstream.core.errors import EngineError
from tests.cli.conftest import ROOT, Slipstream, run_process

HEAVY = {"torch", "transformers", "jinja2", "rich", "numpy", "tokenizers", "safetensors", "huggingface_hub"}
# Some 250 are loaded; one heavy library brings hundreds. The bound is for what nobody thought of.
MAX_MODULES = 400

MODULES_AFTER = """
import json, sys
from slipstream.cli.main import run_command
codes = [run_command(line) for line in json.loads(sys.argv[1])]
print()
print(json.dumps([codes, sorted(sys.modules)]))
"""


def modules_after(*lines: list[str]) -> tuple[list[int], set[str]]:
    """Return the exit codes of command lines in one new process, and every module loaded by then."""
    finished = subprocess.run(
        [sys.executable, "-c", MODULES_AFTER, json.dumps(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    codes, names = json.loads(finished.stdout.rstrip().rpartition("\n")[2])
    return codes, set(names)


def test_help_loads_nothing_heavy() -> None:
    commands = ["run", "chat", "bench", "bench throughput", "bench latency", "models", "collect-env", ""]
    codes, modules = modules_after(["--version"], *([*name.split(), "--help"] for name in commands))
    assert set(codes) == {0} and "slipstream.cli.main" in modules
    assert not {name.partition(".")[0] for name in modules} & HEAVY
    assert len(modules) < MAX_MODULES


def test_a_heavy_import_would_be_seen() -> None:
    """Parsing a size in bytes imports a file of the engine: what is imported late is in the list too."""
    _, with_bytes = modules_after(["run", "m", "p", "--kv-cache-max-bytes", "x"])
    _, without = modules_after(["run", "m", "p", "--kv-cache-max-tokens", "x"])
    assert "slipstream.engine.resolution" in with_bytes - without
    assert not {name.partition(".")[0] for name in with_bytes} & HEAVY


def test_version(slipstream: Slipstream) -> None:
    assert slipstream("--version").out == f"slipstream {package.__version__}\n"


def test_no_arguments_show_the_help(slipstream: Slipstream) -> None:
    shown = slipstream()
    assert shown.code == 0
    assert all(name in shown.out for name in ("run", "chat", "bench"))


def test_python_m_runs_the_command() -> None:
    finished = run_process("--version")
    assert (finished.returncode, finished.stdout) == (0, f"slipstream {package.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rum"], "Did you mean 'run'?"),
        (["bench", "latncy", "m"], "Did you mean 'latency'?"),
        (["bench"], "needs a command: throughput, latency"),
        (["run", "m", "p", "--temprature", "1"], "Did you mean '--temperature'?"),
        (["run", "m", "p", "--max-model-length", "1"], "Did you mean '--max-model-len'?"),
        (["--verson"], "Did you mean '--version'?"),
        (["run", "m", "p", "--frobnicate"], "no option '--frobnicate'"),
        (["run"], "MODEL"),
        (["run", "m", "p", "q"], "q"),
        (["run", "m", "p", "--max-tokens", "many"], "'many' is not a number of tokens"),
        (["run", "m", "p", "--temperature", "hot"], "--temperature"),
        (["run", "m", "p", "--raw", "--system", "s"], "give one of the two"),
        (["bench", "latency", "m", "--batch-sizes", "1,x"], "'1,x' is not a list of counts"),
        (["bench", "throughput", "m", "--min-isl", "3"], "both --min-isl and --max-isl"),
        (["bench", "throughput", "m", "--dataset", "f", "--osl", "3"], "leave --osl out"),
    ],
)
def test_a_wrong_command_line_is_one_line(slipstream: Slipstream, arguments: list[str], said: str) -> None:
    refused = slipstream(*arguments)
    assert refused.code == 2 and refused.out == ""
    assert refused.err.startswith("Error: ") and refused.err.count("\n") == 1
    assert said in refused.err


@pytest.mark.parametrize(
    "spelling", ["--max-tokens=3", "--max_tokens=3", "--max-new-tokens=3", "--max_new_tokens=3"]
)
def test_spellings_of_one_option(slipstream: Slipstream, tiny_path: str, spelling: str) -> None:
    answered = slipstream("run", tiny_path, "hello", "--ignore_eos", spelling)
    assert answered.code == 0
    assert "3 tokens (ended by length)" in answered.err


def test_a_value_keeps_its_underscores(monkeypatch: pytest.MonkeyPatch, slipstream: Slipstream) -> None:
    """Only names are normalised: a stop string that looks like an option is still itself."""
    seen: list[Any] = []
    monkeypatch.setattr("slipstream.cli.run.RunJob.__call__", lambda job: seen.append(job))
    assert slipstream("run", "a_b", "c_d", "--stop", "--max_tokens", "--stop=x_y").code == 0
    assert (seen[0].model, seen[0].prompt, seen[0].sampling.stop) == ("a_b", "c_d", ["--max_tokens", "x_y"])


def failing(error: BaseException) -> Any:
    def call(job: Any) -> None:
        raise error

    return call


@pytest.mark.parametrize("level", ["warning", "debug"])
def test_an_error_is_one_line_without_traceback(
    monkeypatch: pytest.MonkeyPatch, slipstream: Slipstream, level: str
) -> None:
    monkeypatch.setenv("SLIPSTREAM_LOG", level)
    monkeypatch.setattr("slipstream.cli.run.RunJob.__call__", failing(EngineError("it stopped; start again")))
    failed = slipstream("run", "m", "p")
    assert failed.code == 1 and failed.out == ""
    assert failed.err.endswith("Error: it stopped; start again\n")
    assert ("Traceback" in failed.err) == (level == "debug")
    assert failed.err.count("\n") == 1 or level == "debug"


def test_what_the_package_logs_brings_no_traceback(
    monkeypatch: pytest.MonkeyPatch, slipstream: Slipstream
) -> None:
    def call(job: Any) -> None:
        try:
            raise ValueError("inner")
        except ValueError:
            main_module.logging.getLogger("slipstream.engine.pump").exception("the engine stopped")

    monkeypatch.setattr("slipstream.cli.run.RunJob.__call__", call)
    assert slipstream("run", "m", "p").err == "ERROR slipstream.engine.pump: the engine stopped\n"


def test_a_bug_is_not_dressed_up_as_a_user_error(
    monkeypatch: pytest.MonkeyPatch, slipstream: Slipstream
) -> None:
    monkeypatch.setattr("slipstream.cli.run.RunJob.__call__", failing(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError):
        slipstream("run", "m", "p")


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, slipstream: Slipstream) -> None:
    monkeypatch.setattr("slipstream.cli.run.RunJob.__call__", failing(KeyboardInterrupt()))
    interrupted = slipstream("run", "m", "p")
    assert (interrupted.code, interrupted.out, interrupted.err) == (130, "", "")


def test_an_unknown_log_level_is_refused(monkeypatch: pytest.MonkeyPatch, slipstream: Slipstream) -> None:
    monkeypatch.setenv("SLIPSTREAM_LOG", "debgu")
    refused = slipstream("--version")
    assert refused.code == 1
    assert "Did you mean 'debug'?" in refused.err


def test_a_missing_model_is_one_line(slipstream: Slipstream) -> None:
    refused = slipstream("run", "./no-such-model.gguf", "hello")
    assert refused.code == 1 and refused.out == ""
    assert refused.err.startswith("Error: ") and "no-such-model.gguf" in refused.err
    assert "Traceback" not in refused.err
