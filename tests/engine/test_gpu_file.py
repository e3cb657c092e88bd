"""Do the tests that need a GPU at least import on a machine without one, and is each of them marked?"""

from __future__ import annotations

from tests.engine import test_gpu


def test_the_gpu_tests_are_there_and_marked() -> None:
    names = [name for name in vars(test_gpu) if name.startswith("test_")]
    assert len(names) >= 6
    assert test_gpu.pytestmark.name == "gpu"
    # Their prompts are split into chunks, as they claim.
    assert max(map(len, test_gpu.PROMPTS)) > test_gpu.CHUNKED["max_num_tokens"]
