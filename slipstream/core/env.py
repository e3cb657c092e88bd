"""Which environment variables does Slipstream read? All of them are here, at most 15.

Read at the call, never at import, so that tests and several engines in one process stay independent.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def cache_dir() -> Path:
    """`SLIPSTREAM_CACHE`: where conversions and compiled kernels are kept (default `~/.cache/slipstream`)."""
    return Path(os.environ.get("SLIPSTREAM_CACHE") or Path.home() / ".cache" / "slipstream")


def kernel_cache_dir() -> Path:
    """`SLIPSTREAM_KERNEL_CACHE`: where compiled CPU kernels are kept, if not with the rest of the cache."""
    return Path(os.environ.get("SLIPSTREAM_KERNEL_CACHE") or cache_dir() / "cpu_kernels")


def kernel_cache_key() -> str:
    """Return what `kernel_cache_dir` follows from, without making a path of it: hot code asks."""
    return os.environ.get("SLIPSTREAM_KERNEL_CACHE") or os.environ.get("SLIPSTREAM_CACHE") or ""


def log_level() -> str:
    """`SLIPSTREAM_LOG`: `debug`, `info`, `warning` (default) or `error`."""
    return os.environ.get("SLIPSTREAM_LOG", "warning").upper()


def cpu_instructions() -> str:
    """`SLIPSTREAM_CPU_INSTRUCTIONS`: `avx2`, `avx512vnni` or `neon` in place of the best that the CPU has."""
    return os.environ.get("SLIPSTREAM_CPU_INSTRUCTIONS", "").strip().lower()


def cxx() -> str:
    """`CXX`: the C++ compiler for CPU kernels, with arguments if need be; empty means to look for one."""
    return os.environ.get("CXX", "").strip()


def api_key() -> str:
    """`SLIPSTREAM_API_KEY`: the key that `slipstream serve` asks for where no option names one."""
    return os.environ.get("SLIPSTREAM_API_KEY", "").strip()


def child_environment() -> dict[str, str]:
    """Return this process's environment for a Python process that is to find the same modules."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


# What changes how torch, its libraries and the hub behave, beside our own.
_TELLING = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "LD_PRELOAD"),
    *("LD_LIBRARY_PATH", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_DEBUG", "HF_HOME"),
    *("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"),
)
_SECRET = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASS|CREDENTIAL|AUTH|COOKIE")


def describe_variables() -> dict[str, str]:
    """Return what a bug report may show: our variables and those that matter to torch.

    A value that may be a secret is "(set, not shown)"; the home folder is written as ~.
    """
    home = str(Path.home())
    shown: dict[str, str] = {}
    for name in sorted(os.environ):
        if name in _TELLING or name.startswith("SLIPSTREAM_"):
            value = os.environ[name]
            is_secret = _SECRET.search(name) or "@" in value
            shown[name] = "(set, not shown)" if is_secret else value.replace(home, "~")
    return shown
