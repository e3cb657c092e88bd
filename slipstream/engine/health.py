"""Is an engine making progress? The answer that `/health` and whoever restarts engines go by.

Invariant: it is read without asking the engine's thread, so that a hung one cannot keep anybody waiting.
"""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["ready", "asleep", "stuck", "stopped"]

# A long prompt on a slow CPU takes seconds; what takes longer than this does not come back.
DEFAULT_MAX_STEP_S = 120.0


class Health(msgspec.Struct, frozen=True):
    """`cause` says in a sentence why the state is not "ready"; `num_steps` counts completed steps.

    "asleep" takes no requests until it is told to; "stuck" may yet come back; "stopped" will not.
    """

    state: State
    cause: str = ""
    num_steps: int = 0

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"
