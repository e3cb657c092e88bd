"""Does a report say what it must of a machine, and nothing that is nobody's business?"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import psutil
import pytest
import torch

from slipstream.cli import collect_env
from slipstream.cli.collect_env import cpuinfo_fields, driver_version, quota_cores
from slipstream.core.env import describe_variables
from tests.cli.conftest import Slipstream


def test_the_report_is_of_this_machine(slipstream: Slipstream) -> None:
    report = json.loads(slipstream("collect-env", "--json").out)
    assert report["torch"]["version"] == torch.__version__
    assert report["cpu"]["logical_cores"] == psutil.cpu_count()
    assert 1 <= report["cpu"]["usable_cores"] <= report["cpu"]["logical_cores"]
    assert report["memory"]["total_bytes"] == psutil.virtual_memory().total
    assert platform.python_version() in report["python"]
    assert {"torch", "numpy", "pyyaml"} <= set(report["packages"])
    assert len(report["gpus"]) == torch.cuda.device_count()


def test_people_read_the_same(slipstream: Slipstream) -> None:
    shown = slipstream("collect_env")
    assert shown.code == 0 and shown.err == ""
    assert f"version: {torch.__version__}" in shown.out and "GiB" in shown.out
    assert "instruction_sets: " in shown.out


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch, slipstream: Slipstream) -> None:
    hidden = {
        "SLIPSTREAM_API_KEY": "hunter2a",
        "SLIPSTREAM_PROXY": "http://me:hunter2b@host",
        "HF_TOKEN": "hunter2c",
        "AWS_SECRET_ACCESS_KEY": "hunter2d",
        "LOGNAME": "hunter2e",
    }
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(Path.home() / "kept"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    found = describe_variables()
    assert found["SLIPSTREAM_API_KEY"] == found["SLIPSTREAM_PROXY"] == "(set, not shown)"
    assert found["SLIPSTREAM_CACHE"] == "~/kept"
    assert found["TOKENIZERS_PARALLELISM"] == "false"
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "LOGNAME"} & set(found)
    for arguments in (["collect-env"], ["collect-env", "--json"]):
        assert "hunter2" not in slipstream(*arguments).out


def test_a_machine_that_tells_little(
    monkeypatch: pytest.MonkeyPatch, slipstream: Slipstream, tmp_path: Path
) -> None:
    for name in ("CPUINFO", "CPU_QUOTA", "MEMORY_LIMIT", "DRIVER"):
        monkeypatch.setattr(collect_env, name, tmp_path / "absent")
    report = json.loads(slipstream("collect-env", "--json").out)
    assert report["cpu"]["model"] and report["cpu"]["instruction_sets"] == []
    assert report["memory"]["limit_bytes"] is None and report["torch"]["driver"] is None


def test_a_torch_that_cannot_be_imported_is_reported(
    monkeypatch: pytest.MonkeyPatch, slipstream: Slipstream
) -> None:
    monkeypatch.setitem(collect_env.sys.modules, "torch", None)
    report = json.loads(slipstream("collect-env", "--json").out)
    assert "cannot be imported" in report["torch"]["error"] and report["gpus"] == []


def test_files_of_the_kernel() -> None:
    fields = cpuinfo_fields("model name\t: A CPU @ 2 GHz\nflags\t\t: avx2 fma\n\nmodel name : other\n")
    assert fields == {"model name": "A CPU @ 2 GHz", "flags": "avx2 fma"}
    assert quota_cores("150000 100000\n") == 1.5
    assert quota_cores("max 100000\n") is quota_cores("") is None
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:00:00 UTC 2026\nGCC 12.3"
    assert driver_version(line) == "580.65.06"
    assert driver_version("") is None
