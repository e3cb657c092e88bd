"""Is every line of a --config file either followed or refused by name, and does the command line win?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slipstream.cli.config_file import MAX_BYTES, read_config
from slipstream.cli.options import EngineOptions
from slipstream.core.errors import ConfigError
from slipstream.engine.config import EngineConfig
from tests.cli.conftest import Slipstream


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "engine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("max_seq_len: 64", {"max_seq_len": 64}),
        ("max-seq-len: 32k", {"max_seq_len": 32768}),
        ("max_model_len: 64", {"max_seq_len": 64}),
        ("max-num-seqs: 4\ndtype: float32", {"max_batch_size": 4, "dtype": "float32"}),
        ("gpu_memory_utilization: 1", {"gpu_memory_utilization": 1}),
        ("seed: null", {"seed": None}),
        ("skip_tokenizer_init: true", {"skip_tokenizer_init": True}),
        ("kv_cache_config:\n  max_tokens: 8k", {"kv_cache_config": {"max_tokens": 8192}}),
        ("kv-cache-config: {block-size: 16}", {"kv_cache_config": {"tokens_per_block": 16}}),
        (
            "kv_cache_config: {max_gpu_total_bytes: 40GiB}",
            {"kv_cache_config": {"max_gpu_total_bytes": "40GiB"}},
        ),
        (
            "scheduler_config: {waiting_queue_policy: fcfs}",
            {"scheduler_config": {"waiting_queue_policy": "fcfs"}},
        ),
    ],
)
def test_what_a_file_says(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    assert read_config(write(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_seq_length: 4", "Did you mean 'max_seq_len'?"),
        ("max_running_requests: 4", "use max_batch_size="),
        ("kv_cache_config: {max_token: 4}", "Did you mean 'max_tokens'?"),
        ("kv_cache_config: {max_total_tokens: 4}", "use max_tokens="),
        ("model: m", "take `model` out"),
        ("max_seq_len: 4\nmax-seq-len: 5", "'max_seq_len' is given twice"),
        ("max_seq_len: 4\nmax_model_len: 5", "got 'max_seq_len' twice"),
        ("kv_cache_config:\n  dtype: auto\n  dtype: fp8", "'dtype' is given twice"),
        ("max_seq_len: many", "'many' is not a number of tokens"),
        ("max_seq_len: true", "EngineConfig(max_seq_len=...) must be int, nothing, not True"),
        ("max_seq_len: 1.5", "must be int, nothing, not 1.5"),
        ("dtype: [float32]", "must be str, not a list"),
        ("gpu_memory_utilization: half", "must be float, nothing, not 'half'"),
        ("enforce_eager: 1", "must be bool, nothing, not 1"),
        ("kv_cache_config: 8", "KvCacheConfig needs `name: value` lines, not 8"),
        ("- dtype", "EngineConfig needs `name: value` lines, not a list"),
        ("dtype: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("dtype: [", "is not valid YAML"),
        ("&a kv_cache_config: &b\n  kv_cache_config: *b", "KvCacheConfig has no option 'kv_cache_config'"),
        ("[" * 100_000, "is not valid YAML"),
        (b"dtype: \xff", "is not UTF-8"),
        ("#" * (MAX_BYTES + 1), "too large"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_anchors_that_multiply_cost_no_more_than_the_file(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}, z: *a{i - 1}}}" for i in range(1, 60)]
    with pytest.raises(ConfigError, match="no option 'a0'"):
        read_config(write(tmp_path, "\n".join(lines)))


def test_a_missing_file_is_one_line(slipstream: Slipstream, tmp_path: Path) -> None:
    refused = slipstream("run", "m", "p", "--config", tmp_path / "none.yaml")
    assert refused.code == 1 and "No such file" in refused.err and refused.err.count("\n") == 1


def test_what_is_typed_wins_over_the_file(tmp_path: Path) -> None:
    text = "max_seq_len: 64\nmax_batch_size: 4\nkv_cache_config: {max_tokens: 128, tokens_per_block: 8}\n"
    options = EngineOptions(config=write(tmp_path, text), max_seq_len=32, kv_cache_max_tokens=256)
    defaults = {"enable_block_reuse": False, "tokens_per_block": 64}
    config = EngineConfig(model="m", **options.to_llm_options(kv_defaults=defaults))
    assert (config.max_seq_len, config.max_batch_size) == (32, 4)
    assert config.kv_cache_config is not None
    assert (config.kv_cache_config.max_tokens, config.kv_cache_config.tokens_per_block) == (256, 8)
    assert not config.kv_cache_config.enable_block_reuse


def test_a_file_may_set_an_empty_section(tmp_path: Path) -> None:
    options = EngineOptions(config=write(tmp_path, "kv_cache_config:\nscheduler_config:\n"))
    assert EngineConfig(model="m", **options.to_llm_options()) == EngineConfig(
        model="m", **EngineOptions().to_llm_options()
    )


@pytest.mark.parametrize("spelling", ["--config", "--extra_llm_api_options"])
def test_run_and_chat_follow_the_file(
    slipstream: Slipstream, tiny_path: str, tmp_path: Path, spelling: str
) -> None:
    path = write(tmp_path, "max_seq_len: 32\nscheduler_config: {waiting_queue_policy: fcfs}\n")
    ended = slipstream("run", tiny_path, "x" * 20, "--raw", "--ignore-eos", spelling, path)
    assert "12 tokens (ended by length)" in ended.err
    wins = slipstream(
        "run", tiny_path, "x" * 20, "--raw", "--ignore-eos", spelling, path, "--max-seq-len", 40
    )
    assert "20 tokens (ended by length)" in wins.err
    refused = slipstream("chat", tiny_path, spelling, path, stdin="x" * 40 + "\n")
    assert refused.code == 1 and "32" in refused.err


def test_bench_follows_the_file(slipstream: Slipstream, tiny_path: str, tmp_path: Path) -> None:
    """Also its prefix reuse, which changes how many tokens the engine must execute."""
    text = "max_seq_len: 64\nkv_cache_config: {enable_block_reuse: true, max_tokens: 512}\n"
    asked = ("bench", "latency", tiny_path, "--isl", 8, "--osl", 4, "--runs", 1, "--num-requests", 1)
    record = tmp_path / "record.json"
    done = slipstream(*asked, "--config", write(tmp_path, text), "--json", record)
    assert done.code == 0, done.err
    assert json.loads(record.read_text())["results"]
    too_long = slipstream(*asked[:3], "--isl", 80, "--config", write(tmp_path, text))
    assert too_long.code == 1 and "max_seq_len" in too_long.err


def test_an_argument_without_an_option_points_to_the_file(slipstream: Slipstream) -> None:
    refused = slipstream("run", "m", "p", "--tp-size", 2)
    assert refused.code == 2
    assert "write `tensor_parallel_size: ...` into a file and give it with --config" in refused.err
    assert "--config" not in slipstream("--tp-size", 2).err
