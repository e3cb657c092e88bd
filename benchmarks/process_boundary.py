"""What does an engine's step pay for having its doors in other processes? At 1, 16 and 64 streams.

An instant engine serves here, by hand, one real door in a child process. "receive" is looking for frames,
"send" is grouping, encoding and handing over one step's events; both are on the engine's thread. "door" is
what the other side pays per batch to take it in, without waiting. All are microseconds on a core, so that a
busy host does not count. Steps come back to back, or 1 ms apart, as with a model, and then meet cold caches.

    python benchmarks/process_boundary.py   # a table, and benchmarks/results/process_boundary.json
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from benchmarks.instant_engine import make  # noqa: E402
from slipstream.core.env import child_environment  # noqa: E402
from slipstream.core.sampling_params import SamplingParams  # noqa: E402
from slipstream.engine.config import EngineConfig  # noqa: E402
from slipstream.engine.engine_server import EngineServer  # noqa: E402
from slipstream.engine.process_client import ProcessClient  # noqa: E402
from slipstream.engine.sockets import Endpoint, make_endpoint, private_folder  # noqa: E402

RESULT = Path(__file__).parent / "results" / "process_boundary.json"
STREAMS = (1, 16, 64)
NUM_STEPS = 2000
PACES_S = (0.0, 0.001)


def be_a_door(endpoint: Endpoint, num_streams: int) -> None:
    """Submit, take events until all have ended, and print the on-core microseconds per batch."""
    client = ProcessClient(endpoint)
    params = SamplingParams(max_tokens=NUM_STEPS + 1, ignore_eos=True, detokenize=False)
    from slipstream.core.request import Request

    limits = client.info.limits
    requests = [
        Request.create([5 + i] * 9, params, limits, request_id=f"chat-{i}") for i in range(num_streams)
    ]
    client.submit(requests)
    times: list[float] = []
    left = num_streams
    while left:
        started = time.thread_time()
        events = client.events(5.0)
        times.append((time.thread_time() - started) * 1e6)
        left -= sum(event.finish_reason is not None for event in events)
    client.close()
    print(statistics.median(times), len(times), flush=True)


def measure(num_streams: int, *, pace_s: float) -> dict[str, Any]:
    served = make(EngineConfig(model="instant"), lambda what, share: None)
    server = EngineServer(served.client, served.info, make_endpoint(private_folder()))
    server._heart.start()
    arguments = [
        sys.executable,
        __file__,
        "door",
        json.dumps(msgspec.to_builtins(server.endpoint)),
        str(num_streams),
    ]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, env=child_environment(), text=True)
    receive: list[float] = []
    step: list[float] = []
    send: list[float] = []
    while served.client.engine.scheduler.num_running + len(served.client._inbox) < num_streams:
        server._receive()
        server._send_events(served.client.events(0.0))
    while served.client.engine.has_work:
        marks = [time.thread_time()]
        server._receive()
        marks.append(time.thread_time())
        events = served.client.events(0.0)
        marks.append(time.thread_time())
        server._send_events(events)
        marks.append(time.thread_time())
        for times, i in ((receive, 0), (step, 1), (send, 2)):
            times.append((marks[i + 1] - marks[i]) * 1e6)
        time.sleep(pace_s)
    assert child.stdout is not None
    median, batches = child.stdout.read().split()
    child.wait()
    server._close("measured")
    return {
        "streams": num_streams,
        "pace_ms": pace_s * 1e3,
        "steps": len(send),
        "receive_us": round(statistics.median(receive), 1),
        "send_us": round(statistics.median(send), 1),
        "boundary_us": round(statistics.median(a + b for a, b in zip(receive, send, strict=True)), 1),
        "scheduler_us": round(statistics.median(step), 1),
        "door_us": round(float(median), 1),
        "door_batches": int(batches),
    }


def main() -> None:
    if sys.argv[1:2] == ["door"]:
        be_a_door(Endpoint(**json.loads(sys.argv[2])), int(sys.argv[3]))
        return
    rows = [measure(num_streams, pace_s=pace_s) for pace_s in PACES_S for num_streams in STREAMS]
    names = ("receive", "send", "both", "step", "door")
    print(f"{'streams':>8}{'pace ms':>9}" + "".join(f"{name:>10}" for name in names) + "   microseconds")
    for row in rows:
        figures = ("receive_us", "send_us", "boundary_us", "scheduler_us", "door_us")
        print(f"{row['streams']:>8}{row['pace_ms']:>9}" + "".join(f"{row[name]:>10}" for name in figures))
    result = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    RESULT.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
