"""What does the server cost beside the model? Streams of an engine without one, to clients that count.

Three processes: the engine (`--engine paced` or `instant`), one API worker as it is served, and a client that
only looks for the ends of events. Reported are output tokens a second in all, the time to first token, and
the processor time of each process per token: that is what does not depend on how many cores they share.

    python benchmarks/serve_overhead.py --model MODEL.gguf --clients 64
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from slipstream.engine.config import EngineConfig  # noqa: E402

RESULT = Path(__file__).parent / "results" / "serve_overhead.json"
ENGINES = {"instant": "benchmarks.instant_engine", "paced": "benchmarks.paced_engine"}
DEADLINE_S = 300.0


def serve(model: str, address: Any, profile: str | None, module: str = ENGINES["instant"]) -> None:
    """Run one API worker over an engine without a model until it is ended."""
    from slipstream.engine.engine_process import start_engine_process
    from slipstream.engine.service import connect_service
    from slipstream.serve.listening import listen
    from slipstream.serve.server import ApiServer
    from slipstream.serve.settings import ServeSettings

    process = start_engine_process(EngineConfig(model=model), module=module)

    class Host:
        def start(self, progress: Any) -> Any:
            return connect_service(process.endpoint, owner=process)

        def has_ended(self) -> bool:
            return process.wait(0.0)

        def stop(self) -> None:
            process.stop()

    settings = ServeSettings(port=0)
    listening = listen(settings)
    server = ApiServer(
        settings,
        Host(),
        listening,
        model_names=("instant",),
        on_ready=lambda service: address.send(listening.getsockname()[1]),
    )
    if profile is None:
        server.run()
        return
    import cProfile

    profiler = cProfile.Profile()
    profiler.runcall(server.run)
    profiler.dump_stats(profile)


async def stream(port: int, body: dict[str, Any], first_s: list[float]) -> int:
    """Read one stream; returns how many events it had."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    started = time.perf_counter()
    writer.write(head.encode() + data)
    count = 0
    tail = b""
    while part := await reader.read(1 << 16):
        if not count and b"data: " in part:
            first_s.append(time.perf_counter() - started)
        count += (tail + part).count(b"\ndata: ")
        tail = part[-6:]
    writer.close()
    assert count, tail
    return count


async def load(port: int, num_clients: int, num_tokens: int) -> dict[str, Any]:
    body = {
        "model": "instant",
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    # Different from the first token on: requests with one prompt wait for one another's.
    prompts = [f"{chr(0x4E00 + i)} The quick brown fox jumps over the lazy dog." for i in range(num_clients)]
    first_s: list[float] = []
    started = time.perf_counter()
    counts = await asyncio.gather(*(stream(port, {**body, "prompt": prompt}, first_s) for prompt in prompts))
    seconds = time.perf_counter() - started
    return {
        "output_tokens_per_s": num_clients * num_tokens / seconds,
        "events": sum(counts),
        "ttft_ms": {
            "median": statistics.median(first_s) * 1e3,
            "max": max(first_s) * 1e3,
        },
    }


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="whose tokenizer is used")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--engine", choices=list(ENGINES), default="paced")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", help="write a profile of the API worker's event loop here")
    parser.add_argument("--json", type=Path, default=RESULT)
    given = parser.parse_args()
    here, there = multiprocessing.get_context("spawn").Pipe()
    worker = multiprocessing.get_context("spawn").Process(
        target=serve, args=(given.model, there, given.profile, ENGINES[given.engine])
    )
    worker.start()
    try:
        assert here.poll(DEADLINE_S), "the server does not start"
        port = here.recv()
        results = [measure(worker.pid, port, count, given) for count in given.clients]
    finally:
        worker.terminate()
        worker.join(30)
    given.json.write_text(
        json.dumps({"cores": psutil.cpu_count(), "engine": given.engine, "results": results}, indent=2) + "\n"
    )


def measure(pid: int | None, port: int, num_clients: int, given: Any) -> dict[str, Any]:
    """Warm up, then return the median run."""
    api = psutil.Process(pid)
    [engine] = [child for child in api.children(recursive=True) if ENGINES[given.engine] in child.cmdline()]
    asyncio.run(load(port, num_clients, 32))
    runs = []
    for _ in range(given.runs):
        before = cpu_s(api), cpu_s(engine), time.process_time()
        run = asyncio.run(load(port, num_clients, given.tokens))
        spent = [
            now - then
            for now, then in zip((cpu_s(api), cpu_s(engine), time.process_time()), before, strict=True)
        ]
        total = num_clients * given.tokens
        names = ("api_us", "engine_us", "client_us")
        runs.append({**run, **{name: s * 1e6 / total for name, s in zip(names, spent, strict=True)}})
    runs.sort(key=lambda run: run["output_tokens_per_s"])
    middle = {"clients": num_clients, "tokens": given.tokens, **runs[len(runs) // 2]}
    print(json.dumps(middle), flush=True)
    return middle


if __name__ == "__main__":
    main()
