"""Which servers do the tests of this room share? One with a tiny random model, for a whole test run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.tiny import tiny_llama, write_folder
from tests.serve.tiny_server import RunningServer, serving_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose model answers at once; nothing that a test does to it may last."""
    with serving_folder(write_folder(tiny_llama(), tmp_path_factory.mktemp("served"))) as server:
        yield server
