"""Does an engine start within the memory of its weights? Peaks are measured from inside a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.tiny import write_folder
from tests.models.twins import make_llama

ROOT = Path(__file__).parent.parent.parent
MEASURE = """
import sys, threading, time
from pathlib import Path
import slipstream.engine.assembly, slipstream.models.llama
from slipstream import LLM

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

peak, is_over = 0, threading.Event()
def sample():
    global peak
    while not is_over.wait(0.002):
        peak = max(peak, anonymous())

before = anonymous()
thread = threading.Thread(target=sample)
thread.start()
llm = LLM(sys.argv[1])
is_over.set()
thread.join()
print(llm.startup.weight_bytes, max(peak, anonymous()) - before)
llm.shutdown()
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 MB in float32."""
    twin = make_llama(
        vocab_size=16_384, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, head_dim=128
    )
    return write_folder(twin, tmp_path_factory.mktemp("large"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("source", ["smollm2_path", "large_folder"])
def test_loading_needs_little_more_than_the_weights(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The timeout is a hang guard: it includes starting Python and importing torch."""
    path = request.getfixturevalue(source)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**os.environ, "SLIPSTREAM_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    weight_bytes, grown = map(int, done.stdout.split())
    assert weight_bytes > (90_000_000 if source == "smollm2_path" else 150_000_000)
    # Large pages, a few chunks of 8 MB, and the tokenizer, made meanwhile; a second copy would be far more.
    assert weight_bytes <= grown < weight_bytes + max(0.2 * weight_bytes, 60_000_000)
