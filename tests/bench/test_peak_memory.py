"""Does the peak follow what the process really touched?"""

from __future__ import annotations

import subprocess
import sys

from slipstream.bench.peak_memory import peak_memory_bytes

TOUCHED_MIB = 200
PROBE = f"""
from slipstream.bench.peak_memory import peak_memory_bytes
before = peak_memory_bytes("cpu")
block = bytearray({TOUCHED_MIB} << 20)
del block
print(before, peak_memory_bytes("cpu"))
"""


def test_peak_counts_memory_that_was_given_back() -> None:
    """In a child, so that the peak of the test process, reached long ago, does not hide the change."""
    finished = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60, check=True
    )
    before, after = (int(part) for part in finished.stdout.split())
    # A few MiB of slack: the allocator may reuse pages that were resident before.
    assert (TOUCHED_MIB - 8) << 20 <= after - before <= (TOUCHED_MIB + 50) << 20
    # Not inherited from this process, which is far larger once torch is loaded.
    assert before < 100 << 20


def test_peak_is_bytes() -> None:
    assert peak_memory_bytes("cpu") > 1 << 20
