"""Which steps have an engine meet every shape that it compiles something for? One of each size.

Every step that can be captured is, then decode steps of every size, prompts of many lengths and one that
fills a step run: kernels are specialised by the model's sizes and by a few classes of how many tokens meet
them, all of which are met so.
Invariant: no request reuses another's pages, so that each runs whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from slipstream.core.errors import EngineError
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.assembly import Assembly

# Where nothing is captured, sizes that fall into different classes of kernels.
PLAIN_SIZES = (1, 2, 4, 16)
LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
NUM_TOKENS = 3
GREEDY: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "detokenize": False}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "logprobs": 5, "seed": 0}
# What is sampled without a list of the leading tokens has kernels of its own: from a nucleus, and from all.
FROM_ALL: dict[str, Any] = {"temperature": 1.0, "seed": 0}
NUCLEUS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "logprobs": 1,
    "seed": 0,
}


def visit_shapes(assembly: Assembly, *, notify: Callable[[str], None] = lambda line: None) -> int:
    """Run the steps on an engine that is ready and idle; returns how many ran. Blocks.

    Raises EngineError for one that fails.
    """
    limits, resolved = assembly.limits, assembly.resolved
    sizes = [size for size in resolved.graph_sizes or PLAIN_SIZES if size <= resolved.max_batch_size]
    longest = limits.max_seq_len - NUM_TOKENS
    lengths = sorted({length for length in (*LENGTHS, resolved.max_num_tokens) if 1 < length <= longest})
    before = assembly.engine.scheduler.stats.num_plans
    notify("every step that can be captured")
    assembly.engine.runner.capture_within(math.inf)
    for params, kind in ((GREEDY, "greedy"), (GREEDY | SAMPLED, "sampled")):
        notify(f"{len(sizes)} sizes of decode steps and {len(lengths)} lengths of prompts, {kind}")
        for size in sizes:
            _run(assembly, [2] * size, params)
        for length in lengths:
            _run(assembly, [length], params)
    notify("the largest size of decode step, without top-k")
    _run(assembly, [2] * sizes[-1], GREEDY | NUCLEUS)
    _run(assembly, [2] * sizes[-1], GREEDY | FROM_ALL)
    return assembly.engine.scheduler.stats.num_plans - before


def _run(assembly: Assembly, lengths: Sequence[int], params: dict[str, Any]) -> None:
    engine, vocab_size = assembly.engine, assembly.limits.vocab_size
    for row, length in enumerate(lengths):
        name = f"tour-{engine.scheduler.stats.num_plans}-{row}"
        ids = [(row + 7 * place) % vocab_size for place in range(length)]
        sampling = SamplingParams(cache_salt=name, **params)
        engine.submit(Request.create(ids, sampling, assembly.limits, request_id=name))
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise EngineError(f"A step of the warm-up failed: {event.error[0]}.")
