"""Where is a model of the Hugging Face hub on this disk? Downloaded on first use through `huggingface_hub`.

Invariant: only configuration, tokenizer and safetensors files are fetched; never pickles, never code.
"""

from __future__ import annotations

import re
from pathlib import Path

from slipstream.core.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TEXT = ["*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "vocab.txt", "merges.txt"]
_WEIGHTS = ["*.safetensors"]
# Sub-folders hold other formats of the same weights; consolidated files repeat them under other names.
_IGNORED = ["*/*", "consolidated*"]


def is_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None


def download(model: str, *, revision: str | None, with_weights: bool = True) -> Path:
    """Return the local folder of `org/name`, downloading what is missing. Blocks; raises CheckpointError."""
    allowed = _TEXT + _WEIGHTS if with_weights else _TEXT
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=allowed, ignore_patterns=_IGNORED
            )
        )
    except Exception as error:
        # The library raises its own errors, those of its HTTP client, and OSError; all mean the same here.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{model}: there is no such path here, and as a model of the Hugging Face hub (revision "
            f"{revision or 'main'}) it could not be fetched: {type(error).__name__}: {reason[0][:300]}. "
            "Check the name and the network; for a gated model set HF_TOKEN; offline, give the path of a "
            "downloaded folder."
        ) from error
