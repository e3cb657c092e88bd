"""Does the fast CPU path answer as the exact one does? Perplexity and greedy tokens against float32.

The texts of benchmarks/data (prose, code, a list) are scored token by token, and 20 prompts are continued by
64 greedy tokens: under float32 with the file's weights, which is the definition; under the default; and by
llama.cpp, on the same token ids. The default passes if its perplexity is within 1% of float32's and its
agreement is at least llama.cpp's with the file as it is.

    python benchmarks/cpu_quality.py .models/*.gguf --peer-python llama_venv/bin/python

Writes benchmarks/results/cpu_quality.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sides.protocol import Side

HERE = Path(__file__).parent
RESULT = HERE / "results" / "cpu_quality.json"
TEXTS = ("prose", "code", "list")
OUTPUT_TOKENS = 64
CONTEXT = 4096
MAX_PERPLEXITY_CHANGE = 0.01
EXACT = "slipstream, float32"
DEFAULT = "slipstream, default"
PEER = "llama.cpp, as shipped"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What one path says: "logprobs" and "top" tokens of each text, and a continuation of each prompt."""

    scores: dict[str, dict[str, list[Any]]]
    continuations: list[list[int]]
    facts: dict[str, Any]


def read_texts() -> tuple[dict[str, str], list[str]]:
    texts = {name: (HERE / "data" / f"{name}.txt").read_text(encoding="utf-8") for name in TEXTS}
    return texts, (HERE / "data" / "prompts.txt").read_text(encoding="utf-8").splitlines()


def ask_ours(
    ours: Side, model: Path, options: dict[str, Any]
) -> tuple[Answers, dict[str, list[int]], list[list[int]]]:
    """Return our answers, and the token ids that the other side is to be asked about."""
    texts, prompts = read_texts()
    facts = ours("load", name="x", path=str(model), options=options, num_sequences=8, context=CONTEXT)
    ids = {name: ours("tokenize", name="x", text=text) for name, text in texts.items()}
    prompt_ids = [ours("tokenize", name="x", text=prompt) for prompt in prompts]
    answers = Answers(
        scores={name: ours("score", name="x", token_ids=ids[name]) for name in TEXTS},
        continuations=ours("greedy", name="x", prompts=prompt_ids, output_tokens=OUTPUT_TOKENS),
        facts=facts,
    )
    ours("unload", name="x")
    return answers, ids, prompt_ids


def ask_peer(
    peer: Side, path: Path, ids: dict[str, list[int]], prompts: Sequence[list[int]], num_threads: int
) -> Answers:
    facts = peer("load", name="x", path=str(path), num_threads=num_threads, num_sequences=1, context=CONTEXT)
    answers = Answers(
        scores={name: peer("score", name="x", token_ids=ids[name]) for name in TEXTS},
        continuations=[
            peer("run", name="x", prompts=[prompt], output_tokens=OUTPUT_TOKENS)["tokens"][0]
            for prompt in prompts
        ],
        facts=facts,
    )
    peer("unload", name="x")
    return answers


def perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-statistics.fmean(logprobs))


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens the two share from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def compare(answers: Answers, exact: Answers) -> dict[str, Any]:
    """Return the figures of one path against float32."""
    shared = [first_difference(a, b) for a, b in zip(answers.continuations, exact.continuations, strict=True)]
    everything = [value for name in TEXTS for value in answers.scores[name]["logprobs"]]
    top, exact_top = (
        [token for name in TEXTS for token in side.scores[name]["top"]] for side in (answers, exact)
    )
    return {
        **answers.facts,
        "perplexity": {
            **{name: perplexity(answers.scores[name]["logprobs"]) for name in TEXTS},
            "all": perplexity(everything),
        },
        "same_top_token": statistics.fmean(a == b for a, b in zip(top, exact_top, strict=True)),
        "shared_tokens": shared,
        "mean_shared_tokens": statistics.fmean(shared),
        "equal_continuations": sum(count == OUTPUT_TOKENS for count in shared),
    }


def judge(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Say whether the default path passes the gate."""
    exact, default = figures[EXACT], figures[DEFAULT]
    change = default["perplexity"]["all"] / exact["perplexity"]["all"] - 1
    verdict: dict[str, Any] = {
        "perplexity_change": change,
        "is_perplexity_kept": abs(change) <= MAX_PERPLEXITY_CHANGE,
    }
    if PEER in figures:
        peer = figures[PEER]
        verdict["agrees_as_well_as_peer"] = default["mean_shared_tokens"] >= peer["mean_shared_tokens"]
        verdict["has_top_token_as_often_as_peer"] = default["same_top_token"] >= peer["same_top_token"]
    return verdict


def examine(model: Path, arguments: argparse.Namespace, log: Path) -> dict[str, Any]:
    ours = Side("slipstream_side.py", num_threads=arguments.threads, log=log)
    answers: dict[str, Answers] = {}
    answers[EXACT], ids, prompts = ask_ours(ours, model, {"dtype": "float32"})
    answers[DEFAULT], _, _ = ask_ours(ours, model, {})
    report: dict[str, Any] = {"model": model.name, **ours("describe"), "peer": None}
    ours.close()
    if arguments.peer_python is not None:
        peer = Side(
            "llama_cpp_side.py", python=str(arguments.peer_python), num_threads=arguments.threads, log=log
        )
        report["peer"] = peer("describe")
        answers[PEER] = ask_peer(peer, model, ids, prompts, arguments.threads)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "requantised.gguf"
            peer("requantize", source=str(model), target=str(path), num_threads=arguments.threads)
            answers["llama.cpp, Q4_0"] = ask_peer(peer, path, ids, prompts, arguments.threads)
        peer.close()
    report["num_tokens"] = {name: len(ids[name]) for name in TEXTS}
    report["paths"] = {label: compare(side, answers[EXACT]) for label, side in answers.items()}
    report["verdict"] = judge(report["paths"])
    return report


def table(report: dict[str, Any]) -> Iterator[str]:
    """Yield one model's figures as lines of Markdown."""
    columns = ("perplexity: prose / code / list / all", "change", "same top token", "shared of 64", "equal")
    yield " | ".join((report["model"], *columns))
    yield "|".join(["---"] * 6)
    reference = report["paths"][EXACT]["perplexity"]["all"]
    for label, figures in report["paths"].items():
        values = " / ".join(f"{figures['perplexity'][name]:.3f}" for name in (*TEXTS, "all"))
        change = figures["perplexity"]["all"] / reference - 1
        yield (
            f"{label} | {values} | {change:+.2%} | {figures['same_top_token']:.1%} | "
            f"{figures['mean_shared_tokens']:.1f} | {figures['equal_continuations']} of "
            f"{len(figures['shared_tokens'])}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="GGUF files")
    parser.add_argument("--peer-python", type=Path, help="the Python of an environment with llama-cpp-python")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each side (all cores)"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.peer_python is None:
        print("No --peer-python: agreement has nothing to be compared with.")
    log = Path(tempfile.gettempdir()) / "cpu_quality.log"
    reports = [examine(model, arguments, log) for model in arguments.models]
    for report in reports:
        print("\n".join(f"| {line} |" for line in table(report)))
        print(report["verdict"], end="\n\n")
    command = "python " + " ".join(["benchmarks/cpu_quality.py", *(Path(a).name for a in sys.argv[1:])])
    record = {"command": command, "threads": arguments.threads, "reports": reports}
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
