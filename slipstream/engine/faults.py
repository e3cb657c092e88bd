"""What does a request that failed with its step get told? The op at fault, or the memory that was missing.

Invariant: the text names our ops, sizes and settings only; what an exception says of itself is for the log.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from slipstream.engine.ledger import Ledger
from slipstream.kernels.plugins import KernelError

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
# Files of the room that compute no op.
NO_OPS = frozenset({"plugins", "open_ops", "registration", "launching", "conformance"})
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.,]+ ?[KMGT]?i?B)")
_FREE = re.compile(r"of which ([\d.,]+ ?[KMGT]?i?B) is free")


def describe_fault(error: BaseException, *, what: str = "the step", ledger: Ledger | None = None) -> str:
    """Return the sentence for everyone whose step failed with `error`; `ledger` is the engine's at start."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        at_start = f". At start, {ledger.line()}" if ledger is not None else ""
        return f"{what} failed: {_missing_memory(error)}{at_start}"
    if isinstance(error, KernelError):
        return f"{what} failed: {error.summary}"
    op = op_at_fault(error)
    place = f" in op {op!r}" if op else ""
    return f"{what} failed: {type(error).__name__}{place}"


def _missing_memory(error: BaseException) -> str:
    """Return torch's own figures with what to change."""
    text = str(error)
    asked, free = _ASKED.search(text), _FREE.search(text)
    figures = f"{asked.group(1)} needed" if asked else "more memory needed than there is"
    figures += f" and {free.group(1)} free" if free else ""
    return (
        f"out of memory, {figures}; lower max_num_tokens or max_batch_size, or leave more room beside the KV "
        "cache (KvCacheConfig: free_gpu_memory_fraction on a GPU, max_tokens on a CPU)"
    )


def op_at_fault(error: BaseException) -> str:
    """Return the op that an exception came out of, "" where it was none of ours.

    It is the one that was called: what it calls itself, a kernel's file or another op, is its own business.
    """
    frame = error.__traceback__
    while frame is not None:
        path = Path(frame.tb_frame.f_code.co_filename)
        if path.is_relative_to(KERNELS) and path.stem not in NO_OPS:
            return path.stem
        frame = frame.tb_next
    return ""
