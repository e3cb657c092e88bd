"""What does serving cost at the pace of a model? The instant engine, with a step every few milliseconds.

Without a pace an engine runs ahead of whoever reads it, and a stream's tokens come in bundles; paced, each
token is an event of its own, as a model's tokens are.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import instant_engine  # noqa: E402
from slipstream.core.plan import StepPlan, StepResult  # noqa: E402
from slipstream.engine.config import EngineConfig  # noqa: E402
from slipstream.engine.engine_child import Progress, ServedEngine, run_engine_process  # noqa: E402

# 64 streams at this pace are 9,100 tokens a second.
STEP_S = 0.007


class PacedRunner(instant_engine.InstantRunner):
    """Lets a step take as long as a small model's would, without using a core for it."""

    def __init__(self, words: list[int]) -> None:
        super().__init__(words)
        self._due_s = 0.0

    def collect(self, handle: StepPlan) -> StepResult:
        now = time.monotonic()
        self._due_s = max(now, self._due_s + STEP_S)
        time.sleep(self._due_s - now)
        return super().collect(handle)


def make(config: EngineConfig, progress: Progress) -> ServedEngine:
    served = instant_engine.make(config, progress)
    engine: Any = served.client.engine
    engine.runner = PacedRunner(engine.runner._words)
    return served


if __name__ == "__main__":
    sys.exit(run_engine_process(make))
