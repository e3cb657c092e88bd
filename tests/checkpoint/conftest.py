"""What do the checkpoint tests share? The `gguf` package's view of a real file, which takes seconds."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2_path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(smollm2_path)
