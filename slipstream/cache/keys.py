"""What identifies the content of a block? A SHA-256 chain over everything that its K and V depend on.

Two blocks share a key only if their tokens, all tokens before them, the adapter, the salt and the media are
the same. A keyed hash of fewer bits invites crafted collisions across users (CVE-2025-25183).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

TOKEN_BYTES = 4


def root_key(*, salt: str | None = None, adapter: str | None = None, media: Sequence[str] = ()) -> bytes:
    """Return the parent key of a first block; lengths are hashed, so that fields cannot run together."""
    digest = hashlib.sha256(b"slipstream-kv-1")
    for part in (salt, adapter, *media):
        data = b"" if part is None else part.encode()
        digest.update(b"\x00" if part is None else b"\x01" + len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def content_of(tokens: Sequence[int]) -> bytes:
    """Return the content of a block, or of blocks one after another: `TOKEN_BYTES` for each token."""
    return struct.pack(f"{len(tokens)}i", *tokens)


def tokens_of(content: bytes) -> list[int]:
    return memoryview(content).cast("i").tolist()


def block_key(parent: bytes, content: bytes) -> bytes:
    """Return the key of a block (a full one, or the tail of a prompt) after `parent`."""
    return hashlib.sha256(parent + content).digest()


def chain_keys(parent: bytes, content: bytes, block_bytes: int) -> list[bytes]:
    """Return the key of every block of `block_bytes` in `content`, each after the one before."""
    sha256 = hashlib.sha256
    keys: list[bytes] = []
    for first in range(0, len(content), block_bytes):
        parent = sha256(parent + content[first : first + block_bytes]).digest()
        keys.append(parent)
    return keys
