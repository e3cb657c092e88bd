"""Where is kept what would otherwise be compiled at every start, and what is in there?"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

from slipstream.core import env
from slipstream.kernels.registration import has_triton


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheContent:
    """The files of one cache by path, with their sizes in bytes."""

    title: str
    folder: Path
    files: dict[Path, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheGrowth:
    """What a cache has gained, beside what was there."""

    title: str
    folder: Path
    num_new: int
    new_bytes: int
    num_kept: int

    def line(self) -> str:
        if not self.num_new:
            there = f"nothing new, {self.num_kept} files there" if self.num_kept else "nothing to keep"
            return f"{self.title}: {there} ({self.folder})"
        return f"{self.title}: {self.num_new} new files, {self.new_bytes:,} bytes ({self.folder})"


def cache_folders() -> dict[str, Path]:
    """Return the folders by what they hold; a folder may be missing as long as nothing was kept."""
    folders = {"kernels for CPUs": env.kernel_cache_dir()}
    if has_triton():
        folders["kernels for GPUs"] = triton_folder()
    return folders


def triton_folder() -> Path:
    """Return where triton keeps what it compiled, as triton itself says where it can."""
    try:
        return Path(importlib.import_module("triton.knobs").cache.dir)
    except (ImportError, AttributeError):
        return Path.home() / ".triton" / "cache"


def look() -> list[CacheContent]:
    return [
        CacheContent(title=title, folder=folder, files=_files_of(folder))
        for title, folder in cache_folders().items()
    ]


def growth(before: list[CacheContent]) -> list[CacheGrowth]:
    """Return what has come to each cache since `before` was looked at."""
    found: list[CacheGrowth] = []
    for old in before:
        now = _files_of(old.folder)
        new = now.keys() - old.files.keys()
        found.append(
            CacheGrowth(
                title=old.title,
                folder=old.folder,
                num_new=len(new),
                new_bytes=sum(now[path] for path in new),
                num_kept=len(now) - len(new),
            )
        )
    return found


def _files_of(folder: Path) -> dict[Path, int]:
    # A file may go while one looks: another process keeps things there too.
    found: dict[Path, int] = {}
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            if path.is_file():
                found[path] = path.stat().st_size
        except OSError:
            continue
    return found
