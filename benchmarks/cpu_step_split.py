"""Where does a decode step's time on a CPU go: compiled kernels, and each part of the Python around them?

Times every step of one request from one token to the next, on the engine's own thread. A part's time is its
own: what it calls that has a row too is taken off. "between steps" is what lies outside the engine's step:
text, events, the hand-over to the caller.
Budget: everything but the kernels takes less than 0.2 ms at batch 1.

    python benchmarks/cpu_step_split.py MODEL    # prints a table, writes results/cpu_step_split.json
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

from slipstream import LLM, SamplingParams

RESULT = Path(__file__).parent / "results" / "cpu_step_split.json"
BUDGET_MS = 0.2
KERNELS = ("ss_decode", "ss_norm", "ss_decoder_blocks", "ss_linear", "ss_embedding", "ss_argmax")


class Clock:
    """Own times of nested calls, in the step at hand; one thread only."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = {}
        self._inner: list[float] = []
        self._last_end = 0.0

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Time calls of an attribute of `owner` under `label`."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                self.now[label] = self.now.get(label, 0.0) + spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        setattr(owner, name, timed)

    def wrap_step(self, engine: Any) -> None:
        """Close one record a step, from the end of the one before it."""
        step = engine.step

        def timed() -> Any:
            started = time.perf_counter()
            self.now = {"between steps": started - self._last_end}
            self._inner = [0.0]
            events = step()
            ended = time.perf_counter()
            self.now["step, the rest"] = ended - started - self._inner[0]
            self.now["total"] = ended - self._last_end
            self._last_end = ended
            self.steps.append(self.now)
            return events

        engine.step = timed


def measure(model: str, batch: int, num_tokens: int) -> dict[str, float]:
    """Return the median milliseconds of each part of a decode step."""
    with LLM(model, max_batch_size=max(batch, 2)) as llm:
        rng = random.Random(0)
        prompts = [[rng.randrange(5, 30_000) for _ in range(128)] for _ in range(batch)]
        greedy = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        llm.generate(prompts, greedy)
        clock, engine = Clock(), llm.startup.engine
        runner = engine.runner
        for name in KERNELS:
            clock.wrap(runner.backend.library, name, "kernels")
        clock.wrap(engine.scheduler, "plan", "plan")
        clock.wrap(engine.scheduler, "commit", "commit")
        clock.wrap(runner, "launch", "launch")
        clock.wrap(runner, "sample", "sample")
        clock.wrap(runner, "collect", "collect")
        clock.wrap_step(engine)
        llm.generate([prompt[::-1] for prompt in prompts], greedy)
    # The first steps compute the prompts, the last has nobody left.
    steps = clock.steps[4:-2]
    labels = dict.fromkeys(label for step in steps for label in step)
    return {label: 1e3 * statistics.median(step.get(label, 0.0) for step in steps) for label in labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    for batch in (1, 16):
        split = measure(args.model, batch, args.tokens)
        host = split["total"] - split["kernels"]
        rows[f"batch {batch}"] = {**{k: round(v, 4) for k, v in split.items()}, "host": round(host, 4)}
        print(f"batch {batch}: " + ", ".join(f"{label} {ms:.3f}" for label, ms in split.items()) + " ms")
        print(
            f"  everything but the kernels: {host:.3f} ms" + (f" (budget {BUDGET_MS})" if batch == 1 else "")
        )
    record = {
        "device": platform.processor() or platform.machine(),
        "model": Path(args.model).name,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
