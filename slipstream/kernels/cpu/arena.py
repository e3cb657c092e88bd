"""Where do packed matrices lie? Side by side in large chunks, so that the system can map them in large pages.

A step reads every weight once, and with pages of 4 KiB the processor would look up a hundred times as many
addresses as its tables hold; a single matrix is often smaller than one large page.
Invariant: what is taken is aligned to 64 bytes, and is not cleared; a chunk lives as long as anything in it.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20
LARGE_PAGE_BYTES = 2 << 20
ALIGNMENT = 64


class Arena:
    """Hands out memory for weights; it keeps no chunk alive by itself. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: weakref.ref[np.ndarray] | None = None
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """Return `num_bytes` of memory, uint8."""
        with self._lock:
            chunk = self._chunk() if self._chunk is not None else None
            if chunk is None or self._used + num_bytes > len(chunk):
                chunk = allocate(max(CHUNK_BYTES, num_bytes))
                self._chunk, self._used = weakref.ref(chunk), -chunk.ctypes.data % LARGE_PAGE_BYTES
            start = self._used
            self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return torch.from_numpy(chunk[start : start + num_bytes])


def allocate(num_bytes: int) -> np.ndarray:
    """Return zeroed, untouched memory, uint8: `num_bytes` from its first boundary of a large page on."""
    size = (-(-num_bytes // LARGE_PAGE_BYTES) + 1) * LARGE_PAGE_BYTES
    if sys.platform == "win32":
        memory = mmap.mmap(-1, size)
    else:
        # Shared memory, the default, is not mapped in large pages.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel built without large pages refuses; ordinary ones do.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)
