"""Does the example of a model from outside still run, and stay short enough to be read?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "custom_model.py"


def test_it_is_under_eighty_lines() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 80


def test_it_generates_from_its_own_checkpoint() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^\[[\d, ]+\] -> \[([\d, ]+)\]$", done.stdout, flags=re.MULTILINE)
    assert [len(line.split(",")) for line in lines] == [8, 8]
    assert len({token for line in lines for token in line.split(", ")}) > 4
