"""What do the command line's tests share? A tiny model, and a way to run a command in this process.

A command in this process is quick, since torch is loaded once; what is about the process itself (signals,
pipes, what is left behind) starts one.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream.checkpoint.opening import open_checkpoint
from slipstream.cli.main import run_command
from slipstream.llm import LLM
from slipstream.text.from_gguf import load_tokenizer_gguf
from tests.bench.tiny_checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def untemplated_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("untemplated"), has_template=False))


@pytest.fixture(scope="session")
def tiny_llm(tiny_path: str) -> Iterator[LLM]:
    with LLM(tiny_path) as llm:
        yield llm


@dataclasses.dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


Slipstream = Callable[..., Finished]


@pytest.fixture
def slipstream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Slipstream]:
    """Run a command line in this process, with `stdin` as a pipe would bring it."""
    logger = logging.getLogger("slipstream")
    before = (list(logger.handlers), logger.level, logger.propagate)

    def run(*arguments: Any, stdin: str | bytes = b"") -> Finished:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        code = run_command([str(argument) for argument in arguments])
        return Finished(code, *capsys.readouterr())

    yield run
    logger.handlers, logger.level, logger.propagate = before


def run_process(*arguments: Any, stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "slipstream", *(str(argument) for argument in arguments)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def smollm2_text(path: Path, token_ids: list[int]) -> str:
    """Return the text of reference tokens of SmolLM2."""
    checkpoint = open_checkpoint(str(path))
    try:
        return load_tokenizer_gguf(checkpoint.config).decode(token_ids)
    finally:
        checkpoint.close()
