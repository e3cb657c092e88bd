"""Which engine's process of the tests fails inside a step? A real one, whose model chokes on two tokens."""

from __future__ import annotations

import sys
from typing import Any

from slipstream.engine.config import EngineConfig
from slipstream.engine.engine_child import Progress, ServedEngine, make_engine, run_engine_process
from tests.engine.tiny import quiet_ids

# Bytes that the tiny models never choose.
POISON, RAISE = quiet_ids()[-1], quiet_ids()[-2]


def make(config: EngineConfig, progress: Progress) -> ServedEngine:
    served = make_engine(config, progress)
    # The class, so that the model stays poisoned when its weights are read again.
    model: Any = type(served.client.engine.runner.model)  # type: ignore[attr-defined]
    forward = model.forward

    def poisoned(self: Any, batch: Any) -> Any:
        if bool((batch.token_ids_T == RAISE).any()):
            raise RuntimeError("a kernel gives up")
        hidden_TD = forward(self, batch)
        rows = batch.row_of_T[batch.token_ids_T == POISON]
        for row in rows.tolist():
            hidden_TD[batch.row_of_T == row] = float("nan")
        return hidden_TD

    model.forward = poisoned
    return served


if __name__ == "__main__":
    sys.exit(run_engine_process(make))
