"""Does the start-up budget add up, and is work on another thread told apart?"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from slipstream.engine.startup_phases import PhaseClock
from tests.bench.tiny_checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def test_phases_are_added_up_and_shown() -> None:
    clock = PhaseClock(import_s=1.5)
    for _ in range(2):
        with clock.phase("open"):
            time.sleep(0.01)
    thread = threading.Thread(target=clock.timed("tokenizer", lambda: time.sleep(0.02)))
    thread.start()
    thread.join()
    assert 0.02 <= clock.seconds["open"] <= clock.total_s and clock.seconds["tokenizer"] >= 0.02
    line = clock.line()
    assert line.startswith("ready in ") and "after an import of 1.50 s: open 0.0" in line
    assert line.endswith(" beside them")


def test_a_phase_that_raises_is_counted_too() -> None:
    clock = PhaseClock()
    with pytest.raises(ValueError), clock.phase("open"):
        raise ValueError
    assert clock.seconds.keys() == {"open"}


def test_an_engine_tells_where_its_start_went(tmp_path: Path) -> None:
    assembly = assemble(EngineConfig(model=str(write_checkpoint(tmp_path / "tiny"))))
    phases = assembly.phases
    assert next(iter(phases)) == "import" and phases["import"] > 0
    assert {"open", "config", "kernels", "build", "weights", "tokenizer", "warm-up", "pool"} <= phases.keys()
    counted = sum(phases.values()) - phases["import"] - phases["tokenizer"]
    # What no phase covers is bookkeeping: a tenth of a second at most, where the whole takes less than one.
    assert assembly.load_s - 0.1 < counted <= assembly.load_s
    assert any(line.startswith("ready in ") and "weights" in line for line in assembly.report)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, time; t = time.perf_counter(); import slipstream; " + (
        "print('torch' in sys.modules, time.perf_counter() - t)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    has_torch, seconds = done.stdout.split()
    assert has_torch == "False" and float(seconds) < 1.0
