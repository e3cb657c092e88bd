"""How much of the engine's speed is left over HTTP, and do streams stay fluent beside a long prompt?

P24: 256 clients stream 128 tokens each from `slipstream serve`, all at once, beside the same work given to
`LLM.generate` on the same card in the same run. P26: 32 streams decode, and a prompt of 32k tokens arrives;
the time between their tokens while it is computed, beside the median before it came, and its first token.
Random weights of Llama-3.1-8B's shapes in bfloat16, random prompt ids, greedy, prefix reuse off, a byte-level
tokenizer of the model's size; client, API workers and engine share the machine's cores.

    python benchmarks/h100_serving.py [--rows P24,P26] [--api-workers 4] [--out serving.json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from h100_rows import LLAMA_8B

from slipstream.bench.serving_client import ServingClient, Target
from slipstream.bench.serving_load import run_in_loop
from slipstream.bench.serving_record import RequestRecord, ServingRequest
from slipstream.trace.reading import read_trace

VOCAB_SIZE = LLAMA_8B["vocab_size"]
TINY = LLAMA_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
RUNS = 3
CLIENTS, PROMPT, OUTPUT = 256, 128, 128
STREAMS, STREAM_TOKENS, LONG_PROMPT = 32, 1500, 32000
SETTLE_S = 3.0
START_S = 240.0

OFFLINE = """
import json, statistics, sys, time
from slipstream import LLM, KvCacheConfig, SamplingParams
folder, device, load_format, prompts, output = json.load(sys.stdin)
reuse = KvCacheConfig(enable_block_reuse=False)
llm = LLM(folder, load_format=load_format, device=device, kv_cache_config=reuse)
params = SamplingParams(max_tokens=output, ignore_eos=True)
times = []
for _ in range(5):
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False, raise_on_error=True)
    times.append(time.perf_counter() - started)
print(json.dumps(times[2:]))
"""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is served, and on what."""

    folder: str
    device: str
    api_workers: int
    seed: int = 0
    load_format: str = "dummy"
    vocab_size: int = VOCAB_SIZE
    # Calls that count, beside one or two that warm up.
    runs: int = RUNS

    def prompts(self, count: int, length: int) -> list[list[int]]:
        generator = random.Random(f"{self.seed}/{count}/{length}")
        return [generator.choices(range(256, self.vocab_size), k=length) for _ in range(count)]


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Write a configuration and a byte-level tokenizer: 256 bytes, and words for the other ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: token_id for token_id, letter in enumerate(letters)}
    for token_id in range(len(vocab), VOCAB_SIZE):
        vocab[f"\u0120w{token_id}"] = token_id
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


@contextlib.contextmanager
def served(setting: Setting, *options: str) -> Iterator[Target]:
    """Run a server for a while; yields how to ask it. It must be ready in time, and end well."""
    port = 8431
    command = [sys.executable, "-m", "slipstream", "serve", setting.folder]
    command += [
        "--load-format",
        setting.load_format,
        "--device",
        setting.device,
        "--port",
        str(port),
        "--served-model-name",
        "model",
    ]
    command += ["--api-workers", str(setting.api_workers), *options]
    process = subprocess.Popen(command, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(f"{url}/ready", process)
        yield Target(url=url, endpoint="completions", model="model", ignore_eos=True, timeout_s=300)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode} before it was ready")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {START_S:g} s")


def steps_of(target: Target, since_s: float) -> dict[str, Any]:
    """Return what the engine's own records say of its steps since then: where the time went."""
    steps = read_trace(target.url).trace.steps
    recent = [step for step in steps if step.scheduled_s >= since_s and step.committed_s]
    ends = itertools.pairwise(step.committed_s for step in recent)
    times = [(b - a) * 1e3 for a, b in ends]
    decode = [t for t, s in zip(times, recent[1:], strict=True) if not s.num_prefill_tokens]
    mixed = [t for t, s in zip(times, recent[1:], strict=True) if s.num_prefill_tokens]
    chunks = [step.num_prefill_tokens for step in recent if step.num_prefill_tokens]
    return {
        "num_steps": len(recent),
        "decode_step_median_ms": round(statistics.median(decode), 2) if decode else None,
        "prompt_step_median_ms": round(statistics.median(mixed), 2) if mixed else None,
        "longest_steps_ms": [round(t, 1) for t in sorted(times)[-5:]],
        "chunk_median_tokens": statistics.median(chunks) if chunks else None,
        "rows_seen": len({step.num_rows for step in recent}),
    }


def require_whole(records: list[RequestRecord], output_tokens: int) -> None:
    for record in records:
        if record.error_kind is not None or record.output_tokens != output_tokens:
            raise SystemExit(
                f"a request failed: {record.error_kind}: {record.error}; the figures mean nothing"
            )


def measure_offline(setting: Setting, *, clients: int, prompt: int, output: int) -> float:
    """Return output tokens/s of such work through `LLM.generate`, in a process of its own."""
    prompts = setting.prompts(clients, prompt)
    order = json.dumps([setting.folder, setting.device, setting.load_format, prompts, output])
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], input=order, text=True, stdout=subprocess.PIPE, check=True
    )
    return clients * output / statistics.median(json.loads(done.stdout.splitlines()[-1]))


async def stream_all(
    target: Target, prompts: list[list[int]], output_tokens: int
) -> tuple[float, list[RequestRecord]]:
    async with ServingClient(target) as client:
        started = time.perf_counter()
        requests = [ServingRequest(prompt, output_tokens) for prompt in prompts]
        records = await asyncio.gather(*(client.send(request) for request in requests))
        return time.perf_counter() - started, list(records)


def measure_p24(setting: Setting) -> dict[str, Any]:
    offline = measure_offline(setting, clients=CLIENTS, prompt=PROMPT, output=OUTPUT)
    rates: list[float] = []
    steps: list[dict[str, Any]] = []
    with served(setting) as target:
        for number in range(setting.runs + 2):
            prompts = dataclasses.replace(setting, seed=number).prompts(CLIENTS, PROMPT)
            begun_s = time.monotonic()
            seconds, records = run_in_loop(stream_all(target, prompts, OUTPUT))
            require_whole(records, OUTPUT)
            rates.append(CLIENTS * OUTPUT / seconds)
            steps.append(steps_of(target, begun_s))
    value = statistics.median(rates[2:])
    ttft = statistics.median(record.ttft_s or 0.0 for record in records)
    return {
        "value": round(value / offline, 3),
        "unit": "served over offline output tokens/s",
        "floor": None,
        "floor_ratio": None,
        "goal": 0.9,
        "is_goal_met": value >= 0.9 * offline,
        "served_tokens_per_s": [round(rate) for rate in rates[2:]],
        "offline_tokens_per_s": round(offline),
        "ttft_median_s": round(ttft, 3),
        "steps": steps[2:],
        "api_workers": setting.api_workers,
        "work": f"Llama-3.1-8B, bfloat16, {CLIENTS} clients x {PROMPT} in / {OUTPUT} out, streamed",
        "reuse": True,
    }


async def stream_beside(target: Target, setting: Setting) -> tuple[list[RequestRecord], RequestRecord]:
    """Let streams decode alone for a while, then send the long prompt."""
    streams = [ServingRequest(prompt, STREAM_TOKENS) for prompt in setting.prompts(STREAMS, PROMPT)]
    async with ServingClient(target) as client:
        tasks = [asyncio.create_task(client.send(request)) for request in streams]
        await asyncio.sleep(SETTLE_S)
        long = await client.send(ServingRequest(setting.prompts(1, LONG_PROMPT)[0], 1))
        return list(await asyncio.gather(*tasks)), long


def gaps(records: list[RequestRecord], begin_s: float, end_s: float) -> list[float]:
    """Return the times between pieces of text whose later one came in the given time."""
    found: list[float] = []
    for record in records:
        times = record.piece_s
        found += [b - a for a, b in itertools.pairwise(times) if begin_s < b <= end_s]
    return found


def measure_p26(setting: Setting) -> dict[str, Any]:
    runs: list[dict[str, float]] = []
    steps: list[dict[str, Any]] = []
    with served(setting) as target:
        for number in range(setting.runs + 1):
            begun_s = time.monotonic()
            records, long = run_in_loop(stream_beside(target, dataclasses.replace(setting, seed=number)))
            require_whole(records, STREAM_TOKENS)
            require_whole([long], 1)
            steps.append(steps_of(target, begun_s))
            first_s = long.piece_s[0]
            beside = gaps(records, long.sent_s, first_s)
            alone = gaps(records, long.sent_s - SETTLE_S / 2, long.sent_s)
            if len(beside) < STREAMS or len(alone) < STREAMS:
                raise SystemExit("too few tokens came while the long prompt ran; the figures mean nothing")
            runs.append(
                {
                    "idle_median_ms": statistics.median(alone) * 1e3,
                    "p99_ms": statistics.quantiles(beside, n=100)[98] * 1e3,
                    "long_ttft_s": first_s - long.sent_s,
                }
            )
    counted = runs[1:]
    middle = {key: round(statistics.median(run[key] for run in counted), 3) for key in counted[0]}
    ratio = middle["p99_ms"] / middle["idle_median_ms"]
    return {
        "value": {"p99_over_idle_median": round(ratio, 2), "long_ttft_s": middle["long_ttft_s"]},
        "unit": "ratio, s",
        "floor": None,
        "floor_ratio": None,
        "goal": {"p99_over_idle_median": 2.0, "long_ttft_s": 3.0},
        "is_goal_met": ratio <= 2.0 and middle["long_ttft_s"] <= 3.0,
        **middle,
        "runs": [{key: round(value, 3) for key, value in run.items()} for run in counted],
        "steps": steps[1:],
        "api_workers": setting.api_workers,
        "work": f"Llama-3.1-8B, bfloat16, {STREAMS} streams, one prompt of {LONG_PROMPT}",
        "reuse": True,
    }


ROWS = {"P24": measure_p24, "P26": measure_p26}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--api-workers", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the driver itself")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), TINY if given.tiny else LLAMA_8B)
        setting = Setting(folder, given.device, given.api_workers, runs=given.runs)
        for name in given.rows.split(","):
            row = ROWS[name](setting)
            command = f"python benchmarks/h100_serving.py --rows {name} --api-workers {given.api_workers}"
            rows[name] = {**row, "command": command}
            print(f"{name}: {json.dumps(rows[name])}", flush=True)
            given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
