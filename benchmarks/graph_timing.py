"""How long does a GPU take for calls that follow each other as in a step? Captured once, then replayed.

Invariant: whoever calls has run the calls before, so that nothing is compiled or loaded while capturing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch


def replayed_us(run: Callable[[], Any], *, count: int, runs: int, skipped: int = 0) -> float:
    """Return the median microseconds of one of the `count` calls that `run` makes.

    It is replayed `runs` times, of which the first `skipped` do not count. What `run` returns lives as long
    as the captured calls, which write to it.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    times: list[float] = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    del kept
    return statistics.median(times[skipped:])
