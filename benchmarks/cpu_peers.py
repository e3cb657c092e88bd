"""How fast is the CPU path beside llama.cpp, on the same file, tokens and threads, in one run?

Three workloads: decoding at batch 1, a prompt of 512 tokens, and 16 requests at once. llama.cpp runs the file
as it is, and requantised to Q4_0, its fastest format on CPUs. Every repetition runs each side once, one after
the other, so that a busy moment hits all of them; figures are medians, and only their ratios carry over to
another machine.

    python benchmarks/cpu_peers.py .models/*.gguf --peer-python llama_venv/bin/python

The peer's Python has llama-cpp-python built for this machine (CMAKE_ARGS=-DGGML_NATIVE=ON); without it only
our side runs. Writes benchmarks/results/cpu_peers.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sides.protocol import Side

RESULT = Path(__file__).parent / "results" / "cpu_peers.json"
CONTEXT = 1024
SEED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """`num_requests` prompts of `isl` random tokens, `osl` tokens after each."""

    name: str
    num_requests: int
    isl: int
    osl: int


WORKLOADS = (
    Workload(name="decode, batch 1", num_requests=1, isl=128, osl=128),
    Workload(name="prefill 512", num_requests=1, isl=512, osl=1),
    Workload(name="16 requests", num_requests=16, isl=128, osl=64),
)
# Goals as ratios to (the file as it is, requantised to Q4_0).
GOALS = {
    "decode, batch 1": (2.0, 1.3),
    "prefill 512": (3.5, 1.8),
    "16 requests, decode together": (3.0, 1.8),
    "16 requests, whole call": (3.0, 1.8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One loaded model of one side."""

    label: str
    side: Side
    name: str
    facts: dict[str, Any]


def rates(workload: Workload, run: dict[str, Any]) -> dict[str, float]:
    """Return tokens per second by the name of the figure.

    "Decode together" divides by a request's own time per token, which on our side includes what others
    prefill meanwhile; the peer prefills all of them before it decodes.
    """
    if workload.osl == 1:
        return {workload.name: workload.num_requests * workload.isl / run["ttft_s"]}
    decode = workload.num_requests / run["tpot_s"]
    if workload.num_requests == 1:
        return {workload.name: decode}
    whole = workload.num_requests * workload.osl / run["wall_s"]
    return {f"{workload.name}, decode together": decode, f"{workload.name}, whole call": whole}


def contestants(
    model: Path, ours: Side, peer: Side | None, *, num_threads: int, options: dict[str, Any], folder: Path
) -> Iterator[Contestant]:
    """Load the model on each side; what is yielded first is ours."""
    sizes = {"num_sequences": max(w.num_requests for w in WORKLOADS), "context": CONTEXT}
    facts = ours("load", name="ours", path=str(model), options=options, **sizes)
    yield Contestant(label="slipstream", side=ours, name="ours", facts=facts)
    if peer is None:
        return
    requantised = folder / f"{model.stem}-requantised-q4_0.gguf"
    peer("requantize", source=str(model), target=str(requantised), num_threads=num_threads)
    for label, path in (("llama.cpp, as shipped", model), ("llama.cpp, Q4_0", requantised)):
        facts = peer("load", name=label, path=str(path), num_threads=num_threads, **sizes)
        yield Contestant(label=label, side=peer, name=label, facts=facts)


def measure(entrants: Sequence[Contestant], *, repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Return figure -> label -> tokens per second of each repetition; a first round warms up uncounted."""
    figures: dict[str, dict[str, list[float]]] = {}
    ours = entrants[0]
    for repetition in range(-1, repetitions):
        for workload in WORKLOADS:
            prompts = ours.side(
                "draw",
                name=ours.name,
                num_requests=workload.num_requests,
                isl=workload.isl,
                seed=SEED + repetition,
            )
            for entrant in entrants:
                run = entrant.side("run", name=entrant.name, prompts=prompts, output_tokens=workload.osl)
                if entrant is ours:
                    # The peer's process holds both of its models.
                    entrant.facts["peak_memory_bytes"] = run["peak_memory_bytes"]
                if repetition >= 0:
                    for figure, rate in rates(workload, run).items():
                        figures.setdefault(figure, {}).setdefault(entrant.label, []).append(rate)
    return figures


def compare(model: Path, arguments: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Measure one model in processes of its own, so that memory and loading are this model's."""
    ours = Side("slipstream_side.py", num_threads=arguments.threads, log=log)
    peer = None
    if arguments.peer_python is not None:
        python = str(arguments.peer_python)
        peer = Side("llama_cpp_side.py", python=python, num_threads=arguments.threads, log=log)
    options = {} if arguments.dtype is None else {"dtype": arguments.dtype}
    with tempfile.TemporaryDirectory() as folder:
        entrants = list(
            contestants(
                model, ours, peer, num_threads=arguments.threads, options=options, folder=Path(folder)
            )
        )
        figures = measure(entrants, repetitions=arguments.repetitions)
    report = {
        "model": model.name,
        **ours("describe"),
        "peer": None if peer is None else peer("describe"),
        "sides": {entrant.label: entrant.facts for entrant in entrants},
        "tokens_per_s": {
            figure: {label: summary(runs) for label, runs in by_label.items()}
            for figure, by_label in figures.items()
        },
        "ratios": ratios(figures),
    }
    ours.close()
    if peer is not None:
        peer.close()
    return report


def summary(runs: Sequence[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(runs), 1), "runs": [round(rate, 1) for rate in runs]}


def ratios(figures: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Return our rate over each other's: the median over repetitions of the ratio within one."""
    found: dict[str, dict[str, float]] = {}
    for figure, by_label in figures.items():
        ours, *others = by_label.values()
        labels = list(by_label)[1:]
        found[figure] = {
            label: round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)
            for label, theirs in zip(labels, others, strict=True)
        }
    return found


def table(report: dict[str, Any]) -> Iterator[str]:
    """Yield the report of one model as lines of Markdown."""
    labels = list(report["sides"])
    yield f"{report['model']} | " + " | ".join(labels) + " | ratios (goals)"
    yield "|".join(["---"] * (len(labels) + 2))
    for figure, by_label in report["tokens_per_s"].items():
        values = [f"{by_label[label]['median']:,.0f}" for label in labels]
        pairs = zip(report["ratios"][figure].values(), GOALS[figure], strict=False)
        yield f"{figure} | " + " | ".join(values) + " | " + ", ".join(f"{r:.2f} ({g:.1f})" for r, g in pairs)
    yield "load, s | " + " | ".join(f"{report['sides'][label]['load_s']:.2f}" for label in labels) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="GGUF files")
    parser.add_argument("--peer-python", type=Path, help="the Python of an environment with llama-cpp-python")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each side (all cores)"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", help="our dtype (the default one)")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.peer_python is None:
        print("No --peer-python: only our side runs, and there is nothing to compare it with.")
    log = Path(tempfile.gettempdir()) / "cpu_peers.log"
    reports = [compare(model, arguments, log) for model in arguments.models]
    for report in reports:
        print("\n".join(f"| {line} |" for line in table(report)), end="\n\n")
    command = "python " + " ".join(["benchmarks/cpu_peers.py", *(Path(a).name for a in sys.argv[1:])])
    record = {"command": command, "threads": arguments.threads, "reports": reports}
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
