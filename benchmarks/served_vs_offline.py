"""What share of the offline speed is left over HTTP? The same work both ways, one after the other, repeated.

So many clients stream from `slipstream serve` with its defaults, all at once, where the offline side gives
such prompts to `LLM.generate` (prefix reuse off; the server sees no prompt twice). The client runs beside the
server on the same cores, and pays for itself there.

    python benchmarks/served_vs_offline.py MODEL.gguf [--clients 16] [--isl 128] [--osl 64]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from pathlib import Path

import psutil
from h100_serving import Setting, measure_offline, require_whole, served, stream_all

from slipstream.bench.serving_load import run_in_loop

RESULT = Path(__file__).parent / "results" / "served_vs_offline.json"
WARM_UPS, RUNS = 1, 3


def measure_served(setting: Setting, *, clients: int, prompt: int, output: int) -> float:
    rates: list[float] = []
    with served(setting) as target:
        for number in range(WARM_UPS + RUNS):
            prompts = dataclasses.replace(setting, seed=1000 + number).prompts(clients, prompt)
            seconds, records = run_in_loop(stream_all(target, prompts, output))
            require_whole(records, output)
            rates.append(clients * output / seconds)
    return statistics.median(rates[WARM_UPS:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--isl", type=int, default=128)
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULT)
    given = parser.parse_args()
    setting = Setting(given.model, "cpu", 1, load_format="auto", vocab_size=given.vocab_size)
    work = {"clients": given.clients, "prompt": given.isl, "output": given.osl}
    pairs: list[dict[str, float]] = []
    for _ in range(given.repeats):
        offline, over_http = measure_offline(setting, **work), measure_served(setting, **work)
        pairs.append({"offline": round(offline, 1), "served": round(over_http, 1)})
        print(json.dumps(pairs[-1]), flush=True)
    shares = [pair["served"] / pair["offline"] for pair in pairs]
    record = {
        "model": os.path.basename(given.model),
        "cores": psutil.cpu_count(logical=False),
        "work": work,
        "output_tokens_per_s": pairs,
        "served_share": round(statistics.median(shares), 3),
        "goal": 0.9,
    }
    print(json.dumps(record))
    given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
