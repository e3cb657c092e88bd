"""What identifies the content of a block? A SHA-256 chain over everything that its K and V depend on.

Two blocks share a key only if their tokens, all tokens before them, the adapter, the salt and the media are
the same. A keyed hash of fewer bits invites crafted collisions across users (CVE-2025-25183).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def root_key(*, salt: str | None = None, adapter: str | None = None, media: Sequence[str] = ()) -> bytes:
    """Return the parent key of a first block; lengths are hashed, so that fields cannot run together."""
    digest = hashlib.sha256(b"slipstream-kv-1")
    for part in (salt, adapter, *media):
        data = b"" if part is None else part.encode()
        digest.update(b"\x00" if part is None else b"\x01" + len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of a block of `tokens` (a full one, or the tail of a prompt) after `parent`."""
    return hashlib.sha256(parent + array("i", tokens).tobytes()).digest()


def extend_keys(keys: list[bytes], root: bytes, tokens: Sequence[int], block_tokens: int) -> None:
    """Append to `keys`, in place, the key of every full block of `tokens` that it lacks."""
    parent = keys[-1] if keys else root
    for first in range(len(keys) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
        parent = block_key(parent, tokens[first : first + block_tokens])
        keys.append(parent)
