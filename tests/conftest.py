"""What does every test get? Real weights, reference outputs, at most two threads, and no network.

Weights are a prerequisite of the suite, so a missing file fails the test that needs it; it never skips.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_THREADS = 2

# Read when torch, tokenizers and huggingface_hub are imported, so set before any test imports them; child
# processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", str(MAX_THREADS))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiling the CPU kernels takes seconds: once for all tests, whatever cache they use for the rest.
os.environ.setdefault("SLIPSTREAM_KERNEL_CACHE", str(ROOT / ".cache" / "cpu_kernels"))

# Read when triton defines a kernel, which any test may bring about: where there is no GPU it is interpreted.
if importlib.util.find_spec("triton") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def limit_threads() -> None:
    """Undo what an earlier test set, without importing torch for a test that does not use it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > MAX_THREADS:
        torch.set_num_threads(MAX_THREADS)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as a GGUF file."""
    return model_file("smollm2-135m-instruct-q4_1.gguf")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M, Q4_K_M, as a GGUF file."""
    return model_file("gemma-3-270m-q4_k_m.gguf")


@pytest.fixture(scope="session")
def reference_cases() -> list[dict[str, Any]]:
    """Greedy outputs of another implementation in float32.

    Each case holds `model` (the stem of a file above), `mode` ("raw" or "chat"), `prompt`, `rendered_prompt`,
    `prompt_token_ids`, `output_token_ids`, and `top1_top2_logit_gap` per output position: where that is below
    1e-3, two correct float32 implementations may choose differently.
    """
    path = ROOT / "tests" / "data" / "greedy_reference.json"
    return json.loads(path.read_text(encoding="utf-8"))["cases"]


def model_file(name: str) -> Path:
    folder = Path(os.environ.get("SLIPSTREAM_TEST_MODELS") or ROOT / ".models")
    path = folder / name
    if not path.is_file():
        pytest.fail(
            f"{name} is not in {folder}. Fetch it with `make models`, or set SLIPSTREAM_TEST_MODELS to the "
            "folder that holds it.",
            pytrace=False,
        )
    return path
