"""How does an API worker log? In the lines of `core.log_lines`, each with the id of the request it is about.

Prompts, keys, headers and query strings are never logged.
"""

from __future__ import annotations

from slipstream.core.log_lines import write_log
from slipstream.serve.request_facts import current_facts


def current_request_id() -> str:
    """Return the id of the request that this task answers, "" outside of any."""
    facts = current_facts()
    return "" if facts is None else facts.request_id


def configure_server_log(*, as_json: bool) -> None:
    """Write this process's log to standard error."""
    write_log(as_json=as_json, request_id=current_request_id)
