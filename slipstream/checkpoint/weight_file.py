"""How are bytes of a model file read? With positioned reads of regular files into fresh buffers.

Invariants: nothing but a regular file is opened (a FIFO or a device would block or never end); every range is
checked against the size recorded at open before a buffer is allocated; a file that shrinks or is rewritten
while it is in use raises `CheckpointError`. Nothing is mapped, because reading a mapping of a truncated file
kills the process with SIGBUS.
"""

from __future__ import annotations

import os
import reprlib
import stat
from pathlib import Path

import numpy as np
import torch

from slipstream.core.errors import CheckpointError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 120
_BRIEF.maxlevel = 3


def damaged(where: str | Path, detail: str) -> CheckpointError:
    """Return the error for a file whose contents break its format."""
    return CheckpointError(f"{where}: {detail}. The file is damaged or not a real model; download it again.")


def shown(value: object) -> str:
    """Return `repr(value)` cut to a readable length and depth: hostile values may be megabytes long."""
    return _BRIEF.repr(value)


def view_bytes(raw: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Return the bytes of a 1-D uint8 array as a 1-D tensor of `dtype` that aliases them."""
    # torch gives an empty array the stride 0 and then refuses to view it.
    return torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0, dtype=dtype)


class WeightFile:
    """An open regular file of `size` bytes. Thread-safe except for `close`. `label` names it in messages."""

    def __init__(self, path: str | Path, *, label: str | Path | None = None) -> None:
        self.label = str(label or path)
        self._fd = -1
        try:
            # Looking first: opening a device can have effects. O_NONBLOCK: a FIFO put here since must not
            # block.
            self._require_regular(os.stat(path))
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._fd)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.label}: cannot be opened: {error}. Check the path.") from error
        try:
            self._require_regular(status)
        except CheckpointError:
            self.close()
            raise
        self.size = status.st_size
        self._modified_ns = status.st_mtime_ns

    def read(self, offset: int, num_bytes: int) -> np.ndarray:
        """Return bytes offset..offset+num_bytes as a new uint8 array."""
        self._require_unchanged(offset, num_bytes)
        buffer = np.empty(num_bytes, dtype=np.uint8)
        self._fill(buffer, offset)
        return buffer

    def read_into(self, offset: int, buffer: np.ndarray) -> None:
        """Fill a one-dimensional uint8 array with the bytes from `offset` on."""
        self._require_unchanged(offset, buffer.size)
        self._fill(buffer, offset)

    def _fill(self, buffer: np.ndarray, offset: int) -> None:
        view, done, num_bytes = buffer.data, 0, buffer.size
        while done < num_bytes:
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.label}: reading failed: {error}. Check the disk.") from error
            if count == 0:
                raise self._changed("it ended early")
            done += count

    def read_bytes(self, offset: int, num_bytes: int) -> bytes:
        return self.read(offset, num_bytes).tobytes()

    def close(self) -> None:
        """Close the descriptor; reading afterwards raises. Calling it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def _require_regular(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "of an unknown kind")
            raise CheckpointError(f"{self.label}: is {kind}; a model file is a regular file. Check the path.")

    def _require_unchanged(self, offset: int, num_bytes: int) -> None:
        if self._fd < 0:
            raise CheckpointError(f"{self.label}: is closed; open the checkpoint again to read from it.")
        status = os.fstat(self._fd)
        if status.st_size != self.size:
            raise self._changed(f"it had {self.size} bytes when opened and has {status.st_size} now")
        if status.st_mtime_ns != self._modified_ns:
            raise self._changed("it was written to after it was opened")
        if not 0 <= offset <= offset + num_bytes <= self.size:
            raise damaged(self.label, f"bytes {offset} to {offset + num_bytes} are not in its {self.size}")

    def _changed(self, detail: str) -> CheckpointError:
        return CheckpointError(
            f"{self.label}: changed while being read: {detail}. Load it again once nothing writes to it."
        )
