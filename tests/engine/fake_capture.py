"""What captures a step where there is no GPU? Nothing: the step itself runs again at each replay.

It runs from the same static tensors and into the same, so that everything around a captured step is tested:
which shape serves a plan, what the host writes, padding, and who gets a token where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slipstream.attention.triton import TritonAttention
from slipstream.engine import runner as runner_file
from slipstream.engine.engine import Engine
from slipstream.engine.graphs import Captured, GraphCapture
from slipstream.engine.runner import Runner
from slipstream.engine.step_shapes import StepShapes


class Replay:
    """A step that runs when it is replayed, and leaves its logits where the capture promised them."""

    def __init__(self, step: Callable[[], tuple[Tensor, Tensor]], captured: Captured) -> None:
        self.step, self.captured = step, captured
        self.logprobs_BW: Tensor | None = None

    def replay(self) -> None:
        self.captured.logits_BV, drawn_3B = self.step()
        # Where a GPU's copy to the host is on its way, the host itself would look at the next step's.
        self.captured.drawn_3B = drawn_3B.clone()
        if self.captured.logprobs_BW is not None:
            # The first is where every step leaves its own.
            if self.logprobs_BW is None:
                self.logprobs_BW = self.captured.logprobs_BW
            self.captured.logprobs_BW = self.logprobs_BW.clone()


class FakeCapture(GraphCapture):
    """Counts as a GPU's would; `num_bytes` is a byte for each capture."""

    def run(self, step: Callable[[], tuple[Tensor, Tensor]]) -> Captured:
        nothing = torch.empty(0)
        captured = Captured(None, nothing, nothing)
        captured.graph = Replay(step, captured)
        self.num_captures += 1
        self.num_bytes += 1
        return captured


def captured_engine(
    assembly: Any, shapes: StepShapes, monkeypatch: Any, *, backend: Any = None, depth: int = 1
) -> Engine:
    """Return an engine like that of an assembly on the CPU, whose steps are captured.

    Attention is by the definitions of the kernels that a GPU runs.
    """
    monkeypatch.setattr(runner_file, "GraphCapture", FakeCapture)
    engine, resolved = assembly.engine, assembly.resolved
    old = engine.runner
    runner = Runner(
        old.model,
        old.groups,
        num_pages=assembly.capacity.num_pages,
        max_batch_size=resolved.max_batch_size,
        max_seq_len=assembly.limits.max_seq_len,
        kv_dtype=getattr(torch, resolved.kv_dtype),
        device=torch.device("cpu"),
        backend=backend or TritonAttention(),
        shapes=shapes,
    )
    return Engine(engine.scheduler, runner, depth=depth)
