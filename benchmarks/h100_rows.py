"""Which work does the H100 benchmark run, what would the card allow, and what did we set out to reach?

Floors: a decode step reads its weights, keys and values at 3.02 TB/s, a prompt's products run at 800 TFLOP/s;
None where no such reckoning holds. Invariant: a row's numbers are those of its own work, stated whole.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MODELS = {"Llama-3.1-8B": LLAMA_8B, "Llama-3.2-1B": LLAMA_1B, "Qwen3-0.6B": QWEN3_06B}

TOKENS_PER_S, CALL_MS, MS_PER_TOKEN = "output tokens/s", "ms", "ms per output token"
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Requests of given prompt and output lengths, or of lengths drawn evenly from a range, seed 0.

    `unit` says what a figure is: output tokens/s, milliseconds of a whole call, or those per output token.
    `sampling` are parameters beside greedy decoding, `runs` how many calls the median is of, `policy` the
    engine's capacity policy: with more requests than fit, evicting some would run their tokens again.
    `goal_share` is (row, share) where the goal is a share of another row's own figure.
    """

    model: str
    requests: int
    prompt: int | Span
    output: int | Span
    floor: float | None
    goal: float
    unit: str = TOKENS_PER_S
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    runs: int = 5
    policy: str = "MAX_UTILIZATION"
    warm_ups: int = 2
    batch_invariant: bool = False
    goal_share: tuple[str, float] | None = None

    def lengths(self) -> list[Span]:
        """Return (prompt, output) of each request."""
        rng = random.Random(0)

        def draw(size: int | Span) -> int:
            return size if isinstance(size, int) else rng.randint(*size)

        return [(draw(self.prompt), draw(self.output)) for _ in range(self.requests)]

    def describe(self) -> str:
        def shown(size: int | Span) -> str:
            return str(size) if isinstance(size, int) else f"{size[0]}..{size[1]}"

        extra = f", {self.sampling}" if self.sampling else ""
        extra += ", batch_invariant" if self.batch_invariant else ""
        sizes = f"{self.requests} x {shown(self.prompt)} in / {shown(self.output)} out"
        return f"{self.model}, bfloat16, {sizes}{extra}"


SAMPLED = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "logprobs": 5}
L8, Q06 = "Llama-3.1-8B", "Qwen3-0.6B"
WORK = {
    "P1": Work(model=L8, requests=1, prompt=128, output=257, floor=201, goal=188),
    "P3": Work(model=L8, requests=64, prompt=128, output=128, floor=9610, goal=8600),
    "P5": Work(model=L8, requests=256, prompt=128, output=128, floor=21600, goal=18500),
    "P7": Work(
        model=L8,
        requests=1000,
        prompt=512,
        output=256,
        floor=11800,
        goal=10000,
        runs=1,
        warm_ups=1,
        policy="GUARANTEED_NO_EVICT",
    ),
    "P9": Work(
        model=L8, requests=1, prompt=128, output=1, floor=5.0, goal=6.5, unit=CALL_MS, runs=25, warm_ups=8
    ),
    "P11": Work(model=L8, requests=1, prompt=2048, output=1, floor=39, goal=43, unit=CALL_MS, runs=9),
    "P17": Work(model=Q06, requests=1, prompt=128, output=257, floor=2530, goal=1600),
    "P18": Work(
        model=Q06,
        requests=256,
        prompt=(100, 1024),
        output=(100, 1024),
        floor=26000,
        goal=23000,
        runs=3,
        warm_ups=1,
    ),
    "P23": Work(
        model="Llama-3.2-1B", requests=1, prompt=128, output=257, floor=0.82, goal=0.90, unit=MS_PER_TOKEN
    ),
    "P25": Work(
        model=L8,
        requests=256,
        prompt=128,
        output=128,
        floor=21600,
        goal=0.95 * 18500,
        sampling=SAMPLED,
        goal_share=("P5", 0.95),
        runs=3,
        warm_ups=1,
    ),
    # What the same bits in every batch cost.
    "P3.invariant": Work(
        model=L8,
        requests=64,
        prompt=128,
        output=128,
        floor=9610,
        goal=0.8 * 8600,
        goal_share=("P3", 0.8),
        batch_invariant=True,
        runs=3,
        warm_ups=1,
    ),
}
# Rows that are no plain work, with (floor, goal) of each key they write; see `h100_parts.py`.
PARTS: dict[str, dict[str, tuple[float | None, float]]] = {
    "P15": {"P15.import": (None, 1.0), "P15.ready": (None, 15.0)},
    "P16": {"P16.1": (0.0, 0.03), "P16.64": (0.0, 0.03), "P16.256": (0.0, 0.03)},
    "P19": {"P19.cold": (83, 90), "P19.warm": (5, 7), "P19.64": (None, 7000)},
    "P27": {"P27.ttft": (920, 1200), "P27.b1": (156, 145), "P27.b8": (488, 440)},
}
HOST_GOALS_MS = {"1": 0.2, "256": 1.0}
