"""What does a step of sampled decoding cost the host, part by part? No model, a small vocabulary, a CPU.

A real engine (scheduler, runner, sampler, outputs) decodes 256 rows over a model whose forward returns
what was made beforehand, so that what is left is the host's: plans, torch calls, objects. "sample" holds the
arithmetic, which a GPU does beside the host; what its host pays there `sampling_kernels.py` measures.

    python benchmarks/host_sampled.py [--rows 256] [--only P25 --profile]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host_cost
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slipstream.attention.torch_reference import TorchReference
from slipstream.cache.groups import resolve
from slipstream.cache.kv_cache import KvCache
from slipstream.core.cache_group import CacheGroup
from slipstream.core.limits import Limits
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.engine import Engine
from slipstream.engine.generation import Generation
from slipstream.engine.output_processor import OutputProcessor
from slipstream.engine.runner import Runner
from slipstream.engine.scheduler import Scheduler

RESULT = Path(__file__).parent / "results" / "host_sampled.json"
VOCAB = 512
PROMPT_TOKENS, BLOCK_TOKENS = 128, 32
WARM_STEPS, STEPS = 12, 60
PARTS = ("plan", "launch", "sample", "collect", "commit", "outputs")
HOT = {"temperature": 0.8, "top_p": 0.95}
WORK: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": HOT,
    "sampled, repetition penalty": HOT | {"repetition_penalty": 1.1},
    "sampled, logprobs 5": HOT | {"logprobs": 5},
    "P25": HOT | {"repetition_penalty": 1.1, "logprobs": 5},
    "min_p": {"temperature": 0.8, "min_p": 0.02},
    "logit_bias": HOT | {"logit_bias": dict.fromkeys(range(20), 1.0)},
    "min_tokens": HOT | {"min_tokens": 4000},
    "bad_token_ids": HOT | {"bad_token_ids": list(range(20))},
}


class Model:
    """Hidden states and logits made beforehand, a new set of logits a step."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self._hidden = torch.zeros(8192, 8)
        self._sets = [torch.randn(256, VOCAB, generator=torch.Generator().manual_seed(i)) for i in range(4)]
        self._count = 0

    def forward(self, batch: Any) -> torch.Tensor:
        return self._hidden[: batch.token_ids_T.shape[0]]

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        self._count += 1
        return self._sets[self._count % 4][: hidden_RD.shape[0]].clone()


class Calls(TorchDispatchMode):
    """Counts torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Clocked:
    """An engine's step whose parts are timed by wrapping them."""

    def __init__(self, rows: int, sampling: dict[str, Any]) -> None:
        declared = [CacheGroup(layers=(0,), kind="full", heads=1, head_dim=8)]
        groups = resolve(declared, block_tokens=BLOCK_TOKENS, element_bytes=4)
        num_pages = 1 + rows * 16
        self.scheduler = Scheduler(KvCache(groups, num_pages), max_batch_size=rows, max_num_tokens=8192)
        self.runner = Runner(
            Model(),
            groups,
            num_pages=num_pages,
            max_batch_size=rows,
            max_seq_len=8192,
            kv_dtype=torch.float32,
            device=torch.device("cpu"),
            backend=TorchReference(),
        )
        self.engine = Engine(self.scheduler, self.runner, depth=2)
        self.outputs = OutputProcessor(None)
        self.times: dict[str, list[float]] = {part: [] for part in PARTS}
        self._wrap(self.scheduler, "plan", "plan")
        self._wrap(self.scheduler, "commit", "commit")
        for part in ("launch", "sample", "collect"):
            self._wrap(self.runner, part, part)
        self._wrap(self.outputs, "process", "outputs")
        limits = Limits(vocab_size=VOCAB, max_seq_len=8192)
        params = SamplingParams(max_tokens=4000, ignore_eos=True, seed=1, **sampling)
        for i in range(rows):
            prompt = [(i * 7 + place) % VOCAB for place in range(PROMPT_TOKENS)]
            request = Request.create(prompt, params, limits, request_id=f"r{i}")
            self.outputs.add(request, Generation(request.request_id, lambda _: None).put)
            self.engine.submit(request)

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        real, times = getattr(owner, name), self.times[part]

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return real(*args)
            finally:
                times.append((time.perf_counter() - started) * 1e3)

        setattr(owner, name, timed)

    def step(self) -> None:
        self.outputs.process(self.engine.step())


def measure(rows: int, sampling: dict[str, Any], profile: cProfile.Profile | None) -> dict[str, Any]:
    clocked = Clocked(rows, sampling)
    for _ in range(WARM_STEPS):
        clocked.step()
    admission_ms = {part: round(max(times), 2) for part, times in clocked.times.items()}
    for times in clocked.times.values():
        times.clear()
    wall: list[float] = []
    if profile is not None:
        profile.enable()
    for _ in range(STEPS):
        started = time.perf_counter()
        clocked.step()
        wall.append((time.perf_counter() - started) * 1e3)
    if profile is not None:
        profile.disable()
    parts = {part: round(statistics.median(times), 3) for part, times in clocked.times.items()}
    calls = Calls()
    before = len(clocked.times["sample"])
    with calls:
        clocked.step()
    assert len(clocked.times["sample"]) == before + 1
    return {
        "ms_per_step": round(statistics.median(wall), 3),
        "mean_ms_per_step": round(statistics.fmean(wall), 3),
        "parts_ms": parts,
        "torch_calls_of_a_step": sum(calls.counts.values()),
        "costliest_while_rows_start_ms": admission_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--only", default="", help="one kind of work instead of all")
    parser.add_argument("--profile", action="store_true", help="print where the time of --only goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    print(f"{'work':<28}{'ms':>8}{'mean':>8}" + "".join(f"{part:>9}" for part in PARTS) + f"{'calls':>7}")
    for name, sampling in WORK.items():
        if args.only and name != args.only:
            continue
        profile = cProfile.Profile() if args.profile else None
        found = results[name] = measure(args.rows, sampling, profile)
        shown = "".join(f"{found['parts_ms'][part]:>9.3f}" for part in PARTS)
        head = f"{name:<28}{found['ms_per_step']:>8.2f}{found['mean_ms_per_step']:>8.2f}"
        print(f"{head}{shown}{found['torch_calls_of_a_step']:>7}", flush=True)
        if profile is not None:
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    if not args.only:
        report = {"device": host_cost.cpu_name(), "rows": args.rows, "vocabulary": VOCAB, "work": results}
        RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
