"""What do the benchmark tests share? One tiny engine, loaded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slipstream.cache.config import KvCacheConfig
from slipstream.llm import LLM
from tests.bench.tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An engine without prefix reuse, as a benchmark starts it."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    with LLM(str(folder), kv_cache_config=KvCacheConfig(enable_block_reuse=False)) as llm:
        yield llm
