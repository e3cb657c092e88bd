"""What does an engine's process of the tests do? What its "model" says: serve the fake device, or fail so.

Run as a module in the place of the engine's own, so that no fault is built into the package.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from slipstream.core.errors import CheckpointError
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine_child import Progress, ServedEngine, run_engine_process
from tests.engine.served import INFO, fake_client

STEP_S = 0.01


def make(config: EngineConfig, progress: Progress) -> ServedEngine:
    progress("loading weights", 0.5)
    match config.model:
        case "refused":
            raise CheckpointError("model.safetensors is damaged at byte 7.")
        case "raises":
            raise ValueError("a surprise")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exits":
            os._exit(3)
        case "hangs":
            time.sleep(3600)
        case "mumbles":
            progress.__self__._file.write(b"not a message\n")  # type: ignore[attr-defined]
        case "prints":
            print("a library says hello", flush=True)
        case _:
            pass
    progress("loading weights", 1.0)
    return ServedEngine(fake_client(step_s=STEP_S), INFO)


if __name__ == "__main__":
    sys.exit(run_engine_process(make))
