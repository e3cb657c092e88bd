"""Does every import go downwards? The rank table of docs/architecture.md, held against the source itself.

An import counts wherever it stands: at module level, inside a function, under TYPE_CHECKING, written
relatively, or as a registry's `"slipstream.room.file:Class"` string. Each check is a function from sources to
violations, and is itself tested with sources that break its rule.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

RANKED_ROOMS = {
    0: "core",
    1: "kernels parallel text",
    2: "checkpoint quant cache media",
    3: "attention sampling",
    4: "layers",
    5: "models adapters",
    6: "speculative",
    7: "engine",
    8: "llm bench verify trace planner simulate quantize build visual",
    9: "serve integrations",
    10: "cli",
    # The package's own files: the table of public names, and `python -m slipstream`.
    11: "__init__ __main__",
}
RANK = {room: rank for rank, rooms in RANKED_ROOMS.items() for room in rooms.split()}

# Facts about the package as a whole, which any room may read off the root.
ROOT_NAMES = {"__version__"}

LAZY_ROW = re.compile(r"slipstream(\.[A-Za-z_]\w*)+(:[A-Za-z_]\w*)?")

Files = dict[str, str]  # path from the repository's root -> source


def package_files() -> Files:
    paths = sorted((ROOT / "slipstream").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    """`slipstream.engine.config` is in room `engine`; the root package is its own room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path: str, node: ast.AST) -> Iterator[str]:
    """Yield the dotted names that one import statement may load, `from x import y` as `x.y`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = PurePosixPath(path).parents[node.level - 1].as_posix().replace("/", ".")
            base = f"{package}.{base}" if base else package
        yield from (f"{base}.{alias.name}" for alias in node.names)


def own_imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of each import of the package in one file, facts of the root aside."""
    for node in ast.walk(ast.parse(source)):
        for name in imports_of(path, node):
            if name.split(".")[0] == "slipstream" and room_of(name) not in ROOT_NAMES:
                yield getattr(node, "lineno", 0), name


def lazy_rows(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and LAZY_ROW.fullmatch(node.value):
            yield node.lineno, node.value.partition(":")[0]


def unknown_rooms(files: Files) -> list[str]:
    return [
        f"{path}: room {room_of(module_of(path))!r} has no rank; rooms are {', '.join(RANK)}"
        for path in files
        if room_of(module_of(path)) not in RANK
    ]


def upward_imports(files: Files) -> list[str]:
    found: list[str] = []
    for path, source in files.items():
        room = room_of(module_of(path))
        for line, name in [*own_imports(path, source), *lazy_rows(source)]:
            # A name off the root (`from slipstream import LLM`) goes through the table of public names.
            target = room_of(name) if room_of(name) in RANK else "__init__"
            if target != room and RANK[target] >= RANK.get(room, -1):
                found.append(f"{path}:{line}: {room} (rank {RANK.get(room)}) imports {name} ({RANK[target]})")
    return found


def import_cycles(files: Files) -> list[str]:
    modules = {module_of(path): path for path in files}
    graph: dict[str, set[str]] = {}
    for path, source in files.items():
        names = {name for _, name in own_imports(path, source)}
        # `from package import x` is the module package.x where there is one, else a name of package.
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module_of(path)] = (targets & set(modules)) - {module_of(path)}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # graphlib lists a cycle from imported to importing module.
        return [" imports ".join(reversed(error.args[1]))]
    return []


def torch_in_core_or_text(files: Files) -> list[str]:
    """`core` names torch as a type only; `text` not at all, so that tokenizing starts fast anywhere."""
    found: list[str] = []
    for path, source in files.items():
        room = room_of(module_of(path))
        if room not in ("core", "text"):
            continue
        tree = ast.parse(source)
        typed = {id(node) for block in typing_blocks(tree) for node in ast.walk(block)}
        for node in ast.walk(tree):
            is_torch = any(name.split(".")[0] == "torch" for name in imports_of(path, node))
            if is_torch and (room == "text" or id(node) not in typed):
                found.append(f"{path}:{getattr(node, 'lineno', 0)}: {room} imports torch")
    return found


def typing_blocks(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements under `if TYPE_CHECKING:`, not those of its else."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from node.body


Check = Callable[[Files], list[str]]
CHECKS: list[Check] = [unknown_rooms, upward_imports, import_cycles, torch_in_core_or_text]


@pytest.mark.parametrize("check", CHECKS)
def test_package_keeps_the_rule(check: Check) -> None:
    files = package_files()
    assert "slipstream/core/plan.py" in files
    violations = check(files)
    assert not violations, "\n".join(violations)


VIOLATIONS: list[tuple[Check, Files]] = [
    (unknown_rooms, {"slipstream/stuff/a.py": ""}),
    (unknown_rooms, {"slipstream/async_llm.py": ""}),
    (upward_imports, {"slipstream/core/a.py": "import slipstream.engine.config"}),
    (upward_imports, {"slipstream/core/a.py": "from slipstream.engine import config"}),
    (upward_imports, {"slipstream/core/a.py": "from slipstream import engine"}),
    (upward_imports, {"slipstream/core/a.py": "from slipstream import LLM"}),
    (upward_imports, {"slipstream/core/a.py": "import slipstream"}),
    (upward_imports, {"slipstream/core/a.py": "def f():\n    from slipstream.text.base import Tokenizer"}),
    (upward_imports, {"slipstream/core/a.py": "if TYPE_CHECKING:\n    from slipstream.text.base import T"}),
    (upward_imports, {"slipstream/core/a.py": "from ..cache import groups"}),
    (upward_imports, {"slipstream/core/a.py": "from .. import cache"}),
    (upward_imports, {"slipstream/core/sub/a.py": "from ...cache.groups import resolve"}),
    (upward_imports, {"slipstream/core/__init__.py": "from ..cache import groups"}),
    (upward_imports, {"slipstream/core/a.py": "ROWS = {'x': 'slipstream.models.llama:Llama'}"}),
    (upward_imports, {"slipstream/cache/a.py": "from slipstream.quant.base import QuantMethod"}),
    (upward_imports, {"slipstream/llm.py": "from slipstream.bench import latency"}),
    (upward_imports, {"slipstream/engine/a.py": "from slipstream.llm import LLM"}),
    (
        import_cycles,
        {
            "slipstream/core/a.py": "from slipstream.core import b",
            "slipstream/core/b.py": "from .c import x",
            "slipstream/core/c.py": "def f():\n    import slipstream.core.a",
        },
    ),
    (
        import_cycles,
        {
            "slipstream/quant/__init__.py": "from slipstream.quant.fp8 import Fp8",
            "slipstream/quant/fp8.py": "from slipstream.quant import TABLE",
        },
    ),
    (torch_in_core_or_text, {"slipstream/core/a.py": "import torch"}),
    (torch_in_core_or_text, {"slipstream/core/a.py": "def f():\n    from torch.nn import functional"}),
    (
        torch_in_core_or_text,
        {"slipstream/core/a.py": "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"},
    ),
    (torch_in_core_or_text, {"slipstream/text/a.py": "if TYPE_CHECKING:\n    import torch"}),
]


@pytest.mark.parametrize(("check", "files"), VIOLATIONS)
def test_check_sees_a_violation(check: Check, files: Files) -> None:
    assert len(check(files)) == 1


ALLOWED: Files = {
    "slipstream/__init__.py": "if TYPE_CHECKING:\n    from slipstream.llm import LLM",
    "slipstream/llm.py": "from slipstream.engine.engine import Engine\nfrom slipstream import __version__",
    "slipstream/engine/engine.py": "from slipstream.engine import scheduler\nfrom ..models import base",
    "slipstream/engine/scheduler.py": "import slipstream.cache.groups",
    "slipstream/models/base.py": "ROWS = {'x': 'slipstream.models.llama:Llama'}",
    "slipstream/cache/groups.py": "import torch\nfrom slipstream.core.errors import nearest",
    "slipstream/core/errors.py": "if TYPE_CHECKING:\n    from torch import Tensor",
    "slipstream/cli/main.py": "import typer\nfrom slipstream import __version__",
    "slipstream/text/base.py": "import torchless\nTEXT = 'see slipstream.engine: it is upstairs'",
}


@pytest.mark.parametrize("check", CHECKS)
def test_check_accepts_what_is_allowed(check: Check) -> None:
    assert check(ALLOWED) == []
