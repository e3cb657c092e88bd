"""Which merges does a SentencePiece vocabulary imply?

SentencePiece BPE stores pieces with scores and no merges: of all neighbours whose join is a piece, it joins
the pair whose piece scores highest (Kudo and Richardson, `SentencePiece`, arXiv:1808.06226). As a merge list:
every way to cut a piece into two pieces, ordered by the piece's score; among cuts of one piece the longest
left part first. User-defined pieces are matched before any merging, so theirs come first.

A quarter of a million pieces take more than a second, so the result is cached under `core.env.cache_dir()`
as JSON: a header with format version, key (hash of pieces, kinds and scores) and hash of the body, then for
each merge its piece and the length of the left part. A file that is not ours, too large, corrupt or of
another key or version is ignored and written anew; a folder that cannot be written costs time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.core.env import cache_dir

Merge = tuple[str, str]

VERSION = 1
# Deriving fewer merges takes less time than it is worth a file.
MIN_CACHED_PIECES = 65_536
MAX_CACHE_BYTES = 64 << 20


def merge_rules(pieces: Sequence[str], priority: Sequence[float], eligible: Sequence[bool]) -> list[Merge]:
    """Return the merges that `pieces` imply, first the ones to apply first.

    `priority[i]` ranks piece i, higher first, ties by index; pieces that are not `eligible` (control and byte
    tokens, which text never spells) take no part.
    """
    if len(pieces) < MIN_CACHED_PIECES:
        return derive(pieces, priority, eligible)[0]
    key = content_key(pieces, priority, eligible)
    path = cache_dir() / "tokenizers" / f"merges-{key}.json"
    cached = read_cache(path, key)
    if cached is not None and (merges := rebuild(pieces, *cached)) is not None:
        return merges
    merges, owners = derive(pieces, priority, eligible)
    write_cache(path, key, (owners, [len(left) for left, _ in merges]))
    return merges


def derive(
    pieces: Sequence[str], priority: Sequence[float], eligible: Sequence[bool]
) -> tuple[list[Merge], list[int]]:
    """Return the merges in order, and for each the index of the piece it makes.

    In sorted order the pieces that begin a piece form a chain above it, so only they are tried as left parts.
    """
    index_of = {piece: i for i, piece in enumerate(pieces) if eligible[i] and piece}
    cuts_of: dict[int, list[Merge]] = {}
    chain: list[str] = []
    for piece in sorted(index_of):
        while chain and not piece.startswith(chain[-1]):
            chain.pop()
        if chain:
            cuts = [(left, rest) for left in chain if (rest := piece[len(left) :]) in index_of]
            if cuts:
                cuts.reverse()
                cuts_of[index_of[piece]] = cuts
        chain.append(piece)
    scores = np.asarray(priority, dtype=np.float64)
    merges: list[Merge] = []
    owners: list[int] = []
    for i in np.lexsort((np.arange(len(pieces)), -scores)).tolist():
        cuts = cuts_of.get(i)
        if cuts:
            merges += cuts
            owners += [i] * len(cuts)
    return merges, owners


def rebuild(pieces: Sequence[str], owners: Any, lengths: Any) -> list[Merge] | None:
    """Return the merges that numbers from a file describe, None where they cannot be about these pieces."""
    try:
        cut = zip(map(pieces.__getitem__, owners), lengths, strict=True)
        return [(piece[:length], piece[length:]) for piece, length in cut]
    except (IndexError, ValueError, TypeError):
        return None


def content_key(pieces: Sequence[str], priority: Sequence[float], eligible: Sequence[bool]) -> str:
    digest = hashlib.sha256(b"%d %d " % (VERSION, len(pieces)))
    digest.update(np.fromiter(map(len, pieces), dtype="<u4", count=len(pieces)).tobytes())
    digest.update("".join(pieces).encode("utf-8", "surrogatepass"))
    digest.update(np.asarray(priority, dtype="<f8").tobytes())
    digest.update(np.asarray(eligible, dtype=np.uint8).tobytes())
    return digest.hexdigest()


def read_cache(path: Path, key: str) -> tuple[Any, Any] | None:
    """Return what `write_cache` wrote for this key, or None."""
    try:
        # Without following links or blocking on a pipe that somebody put there.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(fd, "rb") as file:
            if not is_ours(os.fstat(file.fileno())):
                return None
            header, _, body = file.read(MAX_CACHE_BYTES + 1).partition(b"\n")
        expected = {"version": VERSION, "key": key, "sha256": hashlib.sha256(body).hexdigest()}
        if len(body) > MAX_CACHE_BYTES or json.loads(header) != expected:
            return None
        numbers: Any = json.loads(body)
        owners, lengths = numbers
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return owners, lengths


def is_ours(status: os.stat_result) -> bool:
    """Whether this user alone can have written the file."""
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_CACHE_BYTES:
        return False
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def write_cache(path: Path, key: str, cuts: tuple[list[int], list[int]]) -> None:
    """Put the file in place by an atomic rename, or leave everything as it was."""
    body = json.dumps(cuts, separators=(",", ":")).encode()
    header = {"version": VERSION, "key": key, "sha256": hashlib.sha256(body).hexdigest()}
    temporary = ""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".merges-")
        with os.fdopen(fd, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n" + body)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            if temporary:
                os.unlink(temporary)
