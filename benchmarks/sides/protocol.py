"""How do the sides of a comparison answer? One JSON object a line: a request in, an answer or an error out.

Each side runs in a process and an environment of its own, with the same thread count, and only the one that
was asked computes. Standard library alone, so that any side's Python runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def serve(methods: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests until the input ends. What libraries print goes to standard error instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": methods[request.pop("do")](**request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Side:
    """A process that serves one side. Calls block until it has answered; a failure there raises here."""

    def __init__(self, script: str, *, python: str = sys.executable, num_threads: int, log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        self.name = script
        self._log = log.open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            [python, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def __call__(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}; see {self._log.name}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {do}: {answer['error']}; see {self._log.name}")
        return answer["result"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()
