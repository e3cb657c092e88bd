"""Is every open choice made, with a reason, and memory turned into pages by the rules we state?"""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.cache.config import KvCacheConfig
from slipstream.core.errors import ConfigError, OutOfMemoryError
from slipstream.engine.config import EngineConfig
from slipstream.engine.resolution import (
    Capacity,
    ModelFacts,
    ResolvedConfig,
    fit_capacity,
    parse_bytes,
    resolve,
)

FACTS = ModelFacts(vocab_size=100, max_position_embeddings=4096, dtype="bfloat16")
GIB = 1024**3
PAGE = 64 * 1024
GROUPS = 3


def settle(*, has_cuda: bool = False, **options: Any) -> ResolvedConfig:
    return resolve(EngineConfig(model="m", **options), FACTS, has_cuda=has_cuda)


def fit(
    kv: KvCacheConfig | None = None, *, has_cuda: bool = False, free: int = 8 * GIB, **options: Any
) -> Capacity:
    resolved = settle(has_cuda=has_cuda, kv_cache_config=kv, **options)
    return fit_capacity(resolved, page_bytes=PAGE, num_groups=GROUPS, free_bytes=free, total_bytes=16 * GIB)


@pytest.mark.parametrize(
    ("has_cuda", "device", "dtype", "depth", "rows", "tokens"),
    [(False, "cpu", "float32", 1, 64, 2048), (True, "cuda", "bfloat16", 2, 2048, 8192)],
)
def test_auto_is_resolved_by_the_device(
    has_cuda: bool, device: str, dtype: str, depth: int, rows: int, tokens: int
) -> None:
    resolved = settle(has_cuda=has_cuda)
    chosen = (resolved.device, resolved.dtype, resolved.depth)
    assert chosen == (device, dtype, depth)
    assert (resolved.max_batch_size, resolved.max_num_tokens) == (rows, tokens)
    assert resolved.max_seq_len == FACTS.max_position_embeddings
    # Every choice that was left open says why.
    assert {"device", "dtype", "depth"} <= resolved.reasons.keys()


def test_what_was_asked_for_is_kept_and_needs_no_reason() -> None:
    resolved = settle(
        has_cuda=True,
        device="cpu",
        dtype="bfloat16",
        disable_overlap_scheduler=False,
        max_batch_size=3,
        max_num_tokens=5,
        max_seq_len=7,
    )
    assert (resolved.device, resolved.dtype, resolved.depth) == ("cpu", "bfloat16", 2)
    assert (resolved.max_batch_size, resolved.max_num_tokens, resolved.max_seq_len) == (3, 5, 7)
    assert not {"device", "dtype", "depth"} & resolved.reasons.keys()
    assert settle(disable_overlap_scheduler=True).depth == 1


def test_equal_inputs_resolve_equally() -> None:
    assert settle(seed=3) == settle(seed=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "no CUDA device"),
        ({"gpu_memory_utilization": 0.5}, "the device is a CPU"),
        ({"max_batch_size": 9, "max_num_tokens": 8}, "max_batch_size=9 exceeds max_num_tokens=8"),
        ({"max_seq_len": 4097}, "max_seq_len=4097 must be from 2 to 4096"),
        ({"max_seq_len": 1}, "max_seq_len=1 must be from 2 to 4096"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle(**options)


def test_rows_default_to_no_more_than_a_step_holds() -> None:
    assert settle(max_num_tokens=5).max_batch_size == 5


@pytest.mark.parametrize("free", [100 * GIB, 8 * GIB, GIB])
def test_a_cpu_takes_8192_tokens_or_a_quarter_of_free_memory(free: int) -> None:
    capacity = fit(free=free)
    assert capacity.num_tokens <= 8192
    assert capacity.num_tokens == 8192 or capacity.pool_bytes <= free // 4 + PAGE
    assert capacity.pool_bytes == capacity.num_pages * PAGE
    # One null page beside whole blocks of every group.
    assert (capacity.num_pages - 1) % GROUPS == 0
    assert capacity.num_tokens == (capacity.num_pages - 1) // GROUPS * 32


def test_a_small_machine_gets_the_quarter() -> None:
    capacity = fit(free=64 * 1024**2)
    assert capacity.num_tokens == 64 * 1024**2 // 4 // (PAGE * GROUPS) * 32
    assert capacity.reason == "a quarter of free memory"


@pytest.mark.parametrize(("asked", "blocks"), [(1, 1), (32, 1), (33, 2), (10_000, 313)])
def test_max_tokens_is_rounded_up_to_blocks(asked: int, blocks: int) -> None:
    assert fit(KvCacheConfig(max_tokens=asked)).num_tokens == blocks * 32


def test_more_tokens_than_memory_names_both_numbers() -> None:
    with pytest.raises(OutOfMemoryError, match=r"max_tokens=1000000\) needs [\d,]+ bytes and 1,073,741,824"):
        fit(KvCacheConfig(max_tokens=1_000_000), free=GIB)


def test_not_even_one_block_names_both_numbers() -> None:
    with pytest.raises(OutOfMemoryError, match=r"at least 196,608 bytes.*has 25,000"):
        fit(free=100_000)


def test_a_gpu_takes_a_share_of_free_or_of_total_memory() -> None:
    free = fit(KvCacheConfig(free_gpu_memory_fraction=0.5), has_cuda=True)
    assert free.pool_bytes == pytest.approx(4 * GIB, rel=1e-3)  # a block is 1/20,000 of it
    # Half of 16 GiB are in use already, so three quarters leave a quarter.
    total = fit(has_cuda=True, gpu_memory_utilization=0.75)
    assert total.pool_bytes == pytest.approx(4 * GIB, rel=1e-3)
    assert total.reason == "gpu_memory_utilization"


@pytest.mark.parametrize("has_cuda", [True, False])
def test_a_budget_in_bytes_bounds_every_other(has_cuda: bool) -> None:
    capacity = fit(KvCacheConfig(max_gpu_total_bytes="30MiB"), has_cuda=has_cuda)
    assert 29 * 1024**2 < capacity.pool_bytes <= 30 * 1024**2 + PAGE
    assert capacity.reason == "max_gpu_total_bytes"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (7, 7),
        ("7", 7),
        ("40GiB", 40 * GIB),
        ("512MB", 512_000_000),
        ("2g", 2_000_000_000),
        (" 1.5 KiB", 1536),
    ],
)
def test_sizes_with_units(text: int | str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "many", "1TiB?", "-", "1 000", "nan", "inf", "-1GiB", -1])
def test_what_is_no_size_is_refused(text: int | str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_bytes(text)
