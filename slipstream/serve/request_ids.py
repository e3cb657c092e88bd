"""Under which id is a request spoken of, in its answer, its headers and the log?

Whoever sees it first (the log's middleware) puts it into the ASGI scope's state; nothing else names requests.
"""

from __future__ import annotations

import uuid
from collections.abc import MutableMapping
from typing import Any

STATE_KEY = "request_id"


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """Return the id of a request, giving it one where it has none."""
    state = scope.setdefault("state", {})
    if STATE_KEY not in state:
        state[STATE_KEY] = uuid.uuid4().hex
    return state[STATE_KEY]
