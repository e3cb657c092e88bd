"""What does serving cost if the model costs nothing? An engine whose device answers every step at once.

Run as a module it is an engine's process like any other: scheduler, cache, sockets and messages are real,
only the runner is not. Its tokens are a fixed random sequence of ordinary words, so every step makes text.

    from slipstream.engine.engine_process import start_engine_process
    process = start_engine_process(EngineConfig(model="model.gguf"), module="benchmarks.instant_engine")
"""

from __future__ import annotations

import random
import sys
from typing import Any

from slipstream import __version__
from slipstream.cache.groups import resolve
from slipstream.cache.kv_cache import KvCache
from slipstream.core.cache_group import CacheGroup
from slipstream.core.limits import Limits
from slipstream.core.plan import StepPlan, StepResult
from slipstream.engine.client import Command, InProcessClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine import Engine
from slipstream.engine.engine_child import Progress, ServedEngine, run_engine_process
from slipstream.engine.engine_info import EngineInfo, TokenizerSource
from slipstream.engine.scheduler import Scheduler

BLOCK_TOKENS = 32
POOL_TOKENS = 262_144
MAX_SEQ_LEN = 8192
NUM_WORDS = 4096


class InstantRunner:
    """Answers each sampled row with the next of its words."""

    has_model = True
    needs_host_tokens = False
    wants_capture = False
    counters: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, words: list[int]) -> None:
        self._words = words

    def launch(self, plan: StepPlan) -> StepPlan:
        return plan

    def sample(self, handle: StepPlan, masks: Any = None) -> None:
        return None

    def collect(self, handle: StepPlan) -> StepResult:
        words, step = self._words, handle.step_id
        tokens = {row: [words[(step + row * 61) % NUM_WORDS]] for row in handle.sample}
        return StepResult(handle.step_id, tokens=tokens, executed_tokens=handle.num_tokens)

    def set_model(self, model: Any) -> None:
        return None

    def drop_pages(self) -> None:
        return None

    def make_pages(self) -> None:
        return None

    def capture_within(self, budget_s: float) -> None:
        return None

    def capture_wanted(self) -> None:
        return None


def ordinary_words(model: str) -> tuple[list[int], int]:
    """Return (ids of printable ASCII pieces, size of the vocabulary); of no tokenizer, any ids."""
    rng = random.Random(1)
    if model == "instant":
        return [rng.randrange(100, 32_000) for _ in range(NUM_WORDS)], 32_000
    from slipstream.engine.assembly import read_tokenizer

    tokenizer = read_tokenizer(EngineConfig(model=model))
    assert tokenizer is not None
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    plain = [
        i for i in ids if tokenizer.token_text(i).isascii() and tokenizer.token_text(i).strip().isalpha()
    ]
    return rng.choices(plain, k=NUM_WORDS), tokenizer.vocab_size


def stats(engine: Engine) -> dict[str, Any]:
    scheduler = engine.scheduler
    pool = scheduler.cache.pool
    return {
        "num_running": scheduler.num_running,
        "num_waiting": scheduler.num_waiting,
        "num_free_pages": pool.num_free,
        "num_pages": pool.num_usable,
        "kv_cache_usage": 1.0 - pool.num_free / pool.num_usable,
        "prefix_hit_rate": 0.0,
        "num_preemptions": scheduler.stats.num_preemptions,
        "executed_tokens": scheduler.stats.executed_tokens,
    }


def make(config: EngineConfig, progress: Progress) -> ServedEngine:
    """Put an engine without a model together; `model` names the tokenizer, or is "instant" for none."""
    progress("opening", 0.0)
    model = str(config.model)
    words, vocab_size = ordinary_words(model)
    declared = [CacheGroup(layers=(0,), kind="full", heads=1, head_dim=64)]
    groups = resolve(declared, block_tokens=BLOCK_TOKENS, element_bytes=2)
    num_pages = 1 + POOL_TOKENS // BLOCK_TOKENS
    max_batch_size, max_num_tokens = config.max_batch_size or 256, config.max_num_tokens or 8192
    scheduler = Scheduler(
        KvCache(groups, num_pages), max_batch_size=max_batch_size, max_num_tokens=max_num_tokens
    )
    engine = Engine(scheduler, InstantRunner(words), depth=1)  # type: ignore[arg-type]
    info = info_without_model(
        model,
        limits=Limits(vocab_size=vocab_size, max_seq_len=MAX_SEQ_LEN),
        rows=max_batch_size,
        tokens=max_num_tokens,
        num_pages=num_pages - 1,
        block_tokens=BLOCK_TOKENS,
        tokenizer=None if model == "instant" else TokenizerSource(model=model),
    )
    return ServedEngine(InProcessClient(engine, {"stats": Command(stats)}), info)


def info_without_model(
    model: str,
    *,
    limits: Limits,
    rows: int,
    tokens: int,
    num_pages: int,
    block_tokens: int,
    tokenizer: TokenizerSource | None = None,
) -> EngineInfo:
    """Return what such an engine says of itself, for steps of so many rows and tokens."""
    return EngineInfo(
        model=model,
        version=__version__,
        limits=limits,
        max_batch_size=rows,
        max_num_tokens=tokens,
        num_pages=num_pages,
        tokens_per_block=block_tokens,
        device="none",
        dtype="float32",
        quantization="unquantized",
        report=["an engine without a model, for measuring what is around it"],
        default_sampling={},
        tokenizer=tokenizer,
    )


if __name__ == "__main__":
    sys.exit(run_engine_process(make))
