"""What does a lone call of `LLM.generate` for one token cost the host, phase by phase? No model, a CPU.

Everything but the device is real: the door, the engine's thread, scheduler, prefix cache, rows, and the line
that a captured step reads. The device answers `--device-ms` after the launch, and that wait is in no phase:
the host's share is what comes before the launch and after the result.

    python benchmarks/lone_call.py            # prints a table, writes benchmarks/results/lone_call.json
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host_cost
import torch
from instant_engine import info_without_model

from slipstream.attention.triton import TritonAttention
from slipstream.cache.groups import resolve
from slipstream.cache.kv_cache import KvCache
from slipstream.core.cache_group import CacheGroup
from slipstream.core.limits import Limits
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine import runner as runner_file
from slipstream.engine.client import InProcessClient
from slipstream.engine.engine import Engine
from slipstream.engine.generation import Generation
from slipstream.engine.graphs import Captured, GraphCapture
from slipstream.engine.runner import Runner
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.service import EngineService
from slipstream.engine.step_shapes import StepShapes
from slipstream.llm import LLM

RESULT = Path(__file__).parent / "results" / "lone_call.json"
VOCAB, MAX_SEQ_LEN, BLOCK_TOKENS, ROWS, NUM_PAGES = 128_256, 8192, 32, 256, 32_768
# Name -> (ids of the prompt, how many of them are found in the prefix cache).
WORK = {
    "128": (128, 0),
    "2,048": (2048, 0),
    "4,160": (4160, 0),
    "4,160 behind 4,096": (4160, 4096),
}
# What ends each phase, in order; a phase begins where the one before ends.
PHASES = ("created", "submitted", "picked up", "planned", "launched", "committed", "delivered", "returned")


class InstantCapture(GraphCapture):
    """A captured step that does nothing: every line gets token 0, and is finite."""

    def run(self, step: Callable[[], Any]) -> Captured:
        drawn_3B = torch.zeros(3, ROWS + 64, dtype=torch.int64)
        drawn_3B[2] = 1
        self.num_captures += 1
        return Captured(SimpleNamespace(replay=lambda: None), torch.zeros(1, 1), drawn_3B)


class InstantModel:
    """Hidden states and logits made beforehand, for steps too long to be captured."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self._hidden_TD, self._logits_RV = torch.zeros(MAX_SEQ_LEN, 1), torch.zeros(1, VOCAB)

    def forward(self, batch: Any) -> torch.Tensor:
        return self._hidden_TD[: batch.token_ids_T.shape[0]]

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return self._logits_RV


class Call:
    """An LLM without a model whose calls leave the time at which each phase ended."""

    def __init__(self, device_s: float) -> None:
        self._device_s = device_s
        self.marks: dict[str, float] = {}
        declared = [CacheGroup(layers=(0,), kind="full", heads=1, head_dim=8)]
        groups = resolve(declared, block_tokens=BLOCK_TOKENS, element_bytes=4)
        scheduler = Scheduler(KvCache(groups, NUM_PAGES), max_batch_size=ROWS, max_num_tokens=MAX_SEQ_LEN)
        runner_file.GraphCapture = InstantCapture  # type: ignore[misc]
        runner = Runner(
            InstantModel(),
            groups,
            num_pages=NUM_PAGES,
            max_batch_size=ROWS,
            max_seq_len=MAX_SEQ_LEN,
            kv_dtype=torch.float32,
            device=torch.device("cpu"),
            backend=TritonAttention(),
            shapes=StepShapes.create(
                [1, 2, 4, 8], has_padding=True, max_num_tokens=MAX_SEQ_LEN, max_seq_len=MAX_SEQ_LEN
            ),
        )
        runner.capture_within(60.0)
        engine = Engine(scheduler, runner, depth=2)
        client = InProcessClient(engine)
        # What `LLM.__init__` would make of a model.
        self.llm = LLM.__new__(LLM)
        self.service = self.llm._service = EngineService(
            info_without_model(
                "none",
                limits=Limits(vocab_size=VOCAB, max_seq_len=MAX_SEQ_LEN),
                rows=ROWS,
                tokens=MAX_SEQ_LEN,
                num_pages=NUM_PAGES - 1,
                block_tokens=BLOCK_TOKENS,
            ),
            client,
            None,
        )
        self.service.hold_collector()
        self._mark_phases(engine)

    def _mark_phases(self, engine: Engine) -> None:
        self._mark(self.service, "create_request", "created")
        self._mark(self.service, "submit_batch", "submitted")
        self._mark(engine, "submit", "picked up", is_start=True)
        self._mark(engine.scheduler, "plan", "planned")
        self._mark(engine.runner, "sample", "launched")
        self._mark(engine.runner, "collect", "collected")
        self._mark(engine.scheduler, "commit", "committed")
        self._mark(Generation, "put", "delivered", is_start=True)

    def _mark(self, owner: Any, name: str, phase: str, *, is_start: bool = False) -> None:
        """Note when a method of an object is called or is over, the first time in a call of the door."""
        real, marks, device_s = getattr(owner, name), self.marks, self._device_s

        def marked(*args: Any, **kwargs: Any) -> Any:
            if is_start:
                marks.setdefault(phase, time.perf_counter())
            if name == "collect":
                wait_without_lock(device_s)
            result = real(*args, **kwargs)
            marks.setdefault(phase, time.perf_counter())
            return result

        setattr(owner, name, marked)

    def run(self, ids: list[int]) -> tuple[dict[str, float], float]:
        """Return the milliseconds of each phase of one call, and of all of them."""
        self.marks.clear()
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        started = time.perf_counter()
        (output,) = self.llm.generate([ids], params, use_tqdm=False)
        self.marks["returned"] = time.perf_counter()
        assert output.error is None and len(output.outputs[0].token_ids) == 1
        self.num_cached = output.num_cached_tokens
        return self._phases(started)

    def _phases(self, started: float) -> tuple[dict[str, float], float]:
        """Read the marks, in their order in time where the two threads overlap."""
        marks, last, phases = dict(self.marks), started, dict.fromkeys(PHASES, 0.0)
        waited_from, waited_to = marks["launched"], marks.pop("collected")
        for phase, at in sorted(marks.items(), key=lambda mark: mark[1]):
            phases[phase] = (at - max(last, waited_to if last >= waited_from else last)) * 1e3
            last = at
        host_s = (waited_from - started) + (marks["returned"] - waited_to)
        return phases, host_s * 1e3


def wait_without_lock(seconds: float) -> None:
    """Keep a core busy as a wait for a GPU does: other threads of Python run meanwhile."""
    until, data = time.perf_counter() + seconds, bytes(16_384)
    while time.perf_counter() < until:
        zlib.crc32(data)


def prompts_of(num_ids: int, num_cached: int, count: int) -> list[list[int]]:
    """Return random prompts with `num_cached` ids in common, one more than asked for: it fills the cache."""
    rng = random.Random(f"{num_ids} {num_cached} {count}")

    def draw(size: int) -> list[int]:
        return rng.choices(range(VOCAB), k=size)

    shared = draw(num_cached)
    return [shared + draw(num_ids - num_cached) for _ in range(count + 1)]


def measure(call: Call, name: str, count: int) -> dict[str, Any]:
    """Return medians over `count` calls of one kind."""
    num_ids, num_cached = WORK[name]
    runs: list[tuple[dict[str, float], float]] = []
    for prompt in prompts_of(num_ids, num_cached, count):
        gc.collect(0)
        runs.append(call.run(prompt))
    assert call.num_cached == num_cached, (call.num_cached, num_cached)
    phases, totals = [run[0] for run in runs[1:]], [run[1] for run in runs[1:]]
    return {
        "ids": num_ids,
        "cached": num_cached,
        "calls": count,
        "host_ms": round(statistics.median(totals), 3),
        "p90_ms": host_cost.at_share(totals, 0.9),
        "phases_ms": {phase: round(statistics.median(run[phase] for run in phases), 3) for phase in PHASES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calls", type=int, default=100, help="calls of each kind; medians count")
    parser.add_argument("--device-ms", type=float, default=3.0, help="how long the device takes for a step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    call = Call(args.device_ms / 1e3)
    results: dict[str, Any] = {}
    print(f"{'ids':<20}{'host ms':>9}{'p90':>8}" + "".join(f"{phase:>11}" for phase in PHASES))
    for name in WORK:
        measure(call, name, 5)
        found = results[name] = measure(call, name, args.calls)
        shown = "".join(f"{found['phases_ms'][phase]:>11.3f}" for phase in PHASES)
        print(f"{name:<20}{found['host_ms']:>9.3f}{found['p90_ms']:>8.3f}{shown}", flush=True)
    call.service.close()
    report = {
        "device": host_cost.cpu_name(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "command": "python " + " ".join(["benchmarks/lone_call.py", *sys.argv[1:]]),
        "work": results,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
