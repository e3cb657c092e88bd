# pyright: reportMissingImports=false, reportIndexIssue=false
"""How is a Triton kernel launched here? With programmatic dependent launch where the GPU has it.

Under it a kernel may start while the one before it still runs. Invariant: every kernel launched with
`launch_options` calls `wait_for_previous` before it reads or writes anything that is not constant, and all
of them do so, which makes the order transitive; what comes from torch waits by itself.
Source: CUDA C++ Programming Guide, Programmatic Dependent Launch and Synchronization.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PDL_CAPABILITY = (9, 0)


@triton.jit
def start_next(PDL: tl.constexpr):
    """Let the next kernel of the stream be scheduled as soon as there is room."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until everything before this kernel in its stream is done and visible."""
    if PDL:
        gdc_wait()


@functools.cache
def has_pdl(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) >= PDL_CAPABILITY


@functools.cache
def num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def launch_options(x: torch.Tensor) -> dict[str, Any]:
    """Return the keyword arguments of a launch beside its own: `PDL`, and what makes it true."""
    if x.is_cuda and has_pdl(x.device.index):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def sms_of(x: torch.Tensor) -> int:
    """Return the number of multiprocessors; on a CPU (where Triton interprets) a few."""
    return num_sms(x.device.index) if x.is_cuda else 4
