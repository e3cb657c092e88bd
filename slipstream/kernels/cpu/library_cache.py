"""Where are built libraries kept, and which of them may be loaded?

Invariant: a file is loaded only if this user alone can write it and its SHA-256 is the recorded one; anything
else is built again. A library is named for its own bytes and a small record beside it names the library; both
appear by renaming a finished file, so that two processes building at once never see each other's halves, nor
one's record with the other's library.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from slipstream.core import env

_RECORD = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_.+-]+)\n")


def cache_folder() -> Path:
    """Return a folder that only this user can write: the cache's, or a new one for this process alone."""
    folder = env.kernel_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _is_private(folder) and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    temporary = Path(tempfile.mkdtemp(prefix="slipstream-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def _is_private(path: Path) -> bool:
    """Say whether `path` is this user's own and nobody else can write it; a link is neither."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return False
    if sys.platform == "win32":
        return True
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def find(folder: Path, name: str) -> Path | None:
    """Return the intact library recorded as `name`, or None."""
    record = folder / f"{name}.sha256"
    try:
        match = _RECORD.fullmatch(record.read_text(encoding="ascii")) if _is_private(record) else None
        if match is None:
            return None
        library = folder / match[2]
        is_intact = _is_private(library) and hashlib.sha256(library.read_bytes()).hexdigest() == match[1]
    except (OSError, UnicodeDecodeError):
        return None
    return library if is_intact else None


def find_any(folder: Path, prefix: str) -> Path | None:
    """Return an intact library whose record's name starts with `prefix`, or None."""
    names = sorted(path.name.removesuffix(".sha256") for path in folder.glob("*.sha256"))
    found = (find(folder, name) for name in names if name.startswith(prefix))
    return next((library for library in found if library is not None), None)


def add(folder: Path, name: str, *, suffix: str, build: Callable[[Path], None]) -> Path:
    """Let `build` write a library to the path it is given, keep it as `name`, and return where it lies."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as workplace:
        built = Path(workplace) / f"library{suffix}"
        build(built)
        digest = hashlib.sha256(built.read_bytes()).hexdigest()
        os.chmod(built, 0o700)
        library = folder / f"{name}-{digest[:12]}{suffix}"
        _rename(built, library, digest)
        record = Path(workplace) / "record"
        record.write_text(f"{digest}  {library.name}\n", encoding="ascii", newline="\n")
        os.chmod(record, 0o600)
        os.replace(record, folder / f"{name}.sha256")
    return library


def _rename(built: Path, library: Path, digest: str) -> None:
    try:
        os.replace(built, library)
    except PermissionError:
        # Windows does not replace a library that a process has loaded; an equal one may stay.
        if not library.is_file() or hashlib.sha256(library.read_bytes()).hexdigest() != digest:
            raise
