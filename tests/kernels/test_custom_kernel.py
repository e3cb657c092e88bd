"""Does the example of a kernel from outside still run, pass its grid, and get called by the engine?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.bench.tiny_checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "custom_kernel.py"


def test_it_is_used_by_an_engine(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "tiny")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("kernel 'swiglu-in-float32' for silu_and_mul on cpu: 15 cases agree")
    assert (
        lines[1]
        == "kernel 'swiglu-in-float32' for silu_and_mul: priority 10 (for calls of at most 512 tokens)"
    )
    # Two layers, eight steps (the last token never runs).
    assert re.search(r"^16 calls of swiglu-in-float32$", done.stdout, flags=re.MULTILINE), done.stdout
