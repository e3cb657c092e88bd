"""Does Ctrl-C count while the engine is imported, whatever that import catches?"""

from __future__ import annotations

import signal
import subprocess
import sys

from slipstream.cli.engine_import import import_llm
from tests.cli.conftest import ROOT

# Stands in for the engine: on import it is interrupted, and loses the exception as a real library does.
SWALLOWER = """
import importlib.machinery, os, signal, sys, time

class Swallower:
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "slipstream.llm" else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        except KeyboardInterrupt:
            pass
        module.LLM = "imported"

sys.meta_path.insert(0, Swallower())
signal.signal(signal.SIGINT, {handler})
from slipstream.cli.engine_import import import_llm
{call}
print("survived")
"""


def run_swallower(*, handler: str, call: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SWALLOWER.format(handler=handler, call=call)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_ctrl_c_ends_the_import() -> None:
    ended = run_swallower(handler="signal.default_int_handler", call="import_llm()")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_a_plain_import_would_lose_it() -> None:
    went_on = run_swallower(handler="signal.default_int_handler", call="from slipstream.llm import LLM")
    assert (went_on.returncode, went_on.stdout) == (0, "survived\n")


def test_an_ignored_signal_stays_ignored() -> None:
    went_on = run_swallower(handler="signal.SIG_IGN", call="assert import_llm() == 'imported'")
    assert (went_on.returncode, went_on.stdout) == (0, "survived\n"), went_on.stderr


def test_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert import_llm().__name__ == "LLM"
    assert signal.getsignal(signal.SIGINT) is before
