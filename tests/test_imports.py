"""Is importing the package, and asking its command line for help, free of heavy libraries?

`slipstream --help` answers at once, and a program that only builds records pays for no framework.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "jinja2"}

# Printed last, after whatever the code itself prints.
REPORT = "\nimport sys\nprint('loaded:', *sorted(name.partition('.')[0] for name in sys.modules))"

HELP = """
import sys
from slipstream.cli.main import main
sys.argv = ["slipstream", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""

has_cli = pytest.mark.skipif(
    not (ROOT / "slipstream" / "cli" / "main.py").is_file(), reason="the package has no command line yet"
)


def loaded_by(code: str) -> set[str]:
    """Return the top-level packages in sys.modules after `code` ran in a fresh interpreter."""
    finished = subprocess.run(
        [sys.executable, "-c", code + REPORT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import slipstream",
        "import slipstream; dir(slipstream), slipstream.__version__",
        "from slipstream import SamplingParams, RequestOutput, CompletionOutput, RequestError",
        "import slipstream.core.plan, slipstream.core.batch, slipstream.core.cache_group",
        "import slipstream.text.base, slipstream.checkpoint.base",
        pytest.param("import slipstream.cli.main", marks=has_cli),
        pytest.param(HELP, marks=has_cli, id="slipstream --help"),
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    loaded = loaded_by(code)
    assert "slipstream" in loaded
    assert not loaded & HEAVY


def test_a_heavy_import_would_be_seen() -> None:
    assert "jinja2" in loaded_by("import slipstream, jinja2")
