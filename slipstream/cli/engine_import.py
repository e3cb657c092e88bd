"""How is the engine imported, which takes a second or two, so that Ctrl-C meanwhile still counts?

Somewhere below, that import catches every exception: a KeyboardInterrupt raised there is lost, and the
command would go on as if nothing had been pressed. Nothing is started by then that must be ended in order.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slipstream.llm import LLM

EXIT_INTERRUPTED = 130


def import_llm() -> type[LLM]:
    """Return the `LLM` class; Ctrl-C during its import ends the process at once, with exit code 130.

    Where the signal is ignored, as in a shell's background job, it stays ignored.
    """
    previous = signal.getsignal(signal.SIGINT)
    is_main_thread = threading.current_thread() is threading.main_thread()
    is_ours = is_main_thread and previous is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(EXIT_INTERRUPTED))
    try:
        from slipstream.llm import LLM
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, previous)
    return LLM
