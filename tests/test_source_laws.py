"""Which laws does a source file keep besides its imports? Names, words, sizes, and nothing that runs data.

Each check is a function from sources to violations, and is itself tested with sources that break its rule.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAX_FILE_LINES = 600
MAX_KERNEL_FILE_LINES = 800
MAX_FUNCTION_LINES = 80

# Names that say nothing about what a file answers, and endings that add nothing (`gguf_types` is a subject).
VAGUE_NAMES = {"util", "utils", "common", "helper", "helpers", "misc", "types", "manager"}
VAGUE_ENDINGS = VAGUE_NAMES - {"types"}

# The engine and the cache read capabilities; a name of one feature there is a branch waiting to happen.
CAPABILITY_ROOMS = ("slipstream/engine/", "slipstream/cache/")
FEATURE_WORDS = re.compile(
    r"eagle|medusa|awq|gptq|flashinfer|triton|llama|gemma|mistral|qwen|deepseek", re.IGNORECASE
)

# What turns bytes into running code or objects.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "__import__", "torch.load", "os.system", "os.popen", "yaml.load"}
UNSAFE_METHODS = re.compile(
    r"(send|recv)_pyobj|(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?"
)
UNSAFE_FLAGS = {"shell", "allow_pickle"}

Files = dict[str, str]  # path from the repository's root -> source


def package_files() -> Files:
    paths = sorted((ROOT / "slipstream").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def vague_names(files: Files) -> list[str]:
    """A file or folder is named for its main class or concept, and never numbered."""
    found: list[str] = []
    for path in files:
        for part in PurePosixPath(path).with_suffix("").parts:
            ending = part.rpartition("_")[2]
            if part in VAGUE_NAMES or ending in VAGUE_ENDINGS or re.fullmatch(r"v\d+", ending):
                found.append(f"{path}: {part!r} does not say what it answers")
    return found


def feature_words(files: Files) -> list[str]:
    return [
        f"{path}:{number}: names {match.group()!r}; read a capability instead"
        for path, source in files.items()
        if path.startswith(CAPABILITY_ROOMS)
        for number, line in enumerate(source.splitlines(), start=1)
        if (match := FEATURE_WORDS.search(line))
    ]


def unsafe_code(files: Files) -> list[str]:
    found: list[str] = []
    for path, source in files.items():
        for node in ast.walk(ast.parse(source)):
            found += [f"{path}:{getattr(node, 'lineno', 0)}: {what}" for what in unsafe_parts(node)]
    return found


def unsafe_parts(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (f"imports {a.name}" for a in names if a.name.split(".")[0] in UNSAFE_MODULES)
        case ast.ImportFrom(module=str(module), names=names):
            if module.split(".")[0] in UNSAFE_MODULES:
                yield f"imports from {module}"
            yield from (f"imports {module}.{a.name}" for a in names if f"{module}.{a.name}" in UNSAFE_CALLS)
        case ast.Attribute(attr=attr) if ast.unparse(node) in UNSAFE_CALLS or UNSAFE_METHODS.fullmatch(attr):
            yield f"uses {ast.unparse(node)}"
        case ast.Name(id=name) if name in UNSAFE_CALLS:
            yield f"uses {name}"
        case ast.keyword(arg=str(flag), value=value) if flag in UNSAFE_FLAGS:
            if not (isinstance(value, ast.Constant) and value.value is False):
                yield f"passes {flag}={ast.unparse(value)}"


def oversized(files: Files) -> list[str]:
    found: list[str] = []
    for path, source in files.items():
        limit = MAX_KERNEL_FILE_LINES if path.startswith("slipstream/kernels/") else MAX_FILE_LINES
        lines = len(source.splitlines())
        if lines > limit:
            found.append(f"{path}: {lines} lines, at most {limit}; split it by what it answers")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines; split it")
    return found


def unanswered_questions(files: Files) -> list[str]:
    """A file opens with a docstring that says what it answers."""
    return [
        f"{path}:1: no module docstring; say the one question this file answers"
        for path, source in files.items()
        if source.strip() and not ast.get_docstring(ast.parse(source))
    ]


def logic_in_tables(files: Files) -> list[str]:
    """A room's `__init__` is a table: imports and constants. The root adds the lookup of its own table."""
    found: list[str] = []
    for path, source in files.items():
        if PurePosixPath(path).name != "__init__.py" or path == "slipstream/__init__.py":
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.For | ast.While):
                found.append(f"{path}:{node.lineno}: logic in __init__; move it to a file of its own")
    return found


Check = Callable[[Files], list[str]]
CHECKS: list[Check] = [
    vague_names,
    feature_words,
    unsafe_code,
    oversized,
    unanswered_questions,
    logic_in_tables,
]


@pytest.mark.parametrize("check", CHECKS)
def test_package_keeps_the_law(check: Check) -> None:
    files = package_files()
    assert "slipstream/core/plan.py" in files
    violations = check(files)
    assert not violations, "\n".join(violations)


def function_of(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


VIOLATIONS: list[tuple[Check, Files]] = [
    (vague_names, {"slipstream/core/types.py": ""}),
    (vague_names, {"slipstream/core/text_utils.py": ""}),
    (vague_names, {"slipstream/cache/block_manager.py": ""}),
    (vague_names, {"slipstream/core/common/errors.py": ""}),
    (vague_names, {"slipstream/engine/scheduler_v2.py": ""}),
    (feature_words, {"slipstream/engine/a.py": "# as Llama does it"}),
    (feature_words, {"slipstream/engine/sub/a.py": "if name == 'eagle3': pass"}),
    (feature_words, {"slipstream/cache/a.py": "class FlashInferTable: pass"}),
    (unsafe_code, {"slipstream/core/a.py": "import pickle"}),
    (unsafe_code, {"slipstream/core/a.py": "def f():\n    from marshal import loads"}),
    (unsafe_code, {"slipstream/core/a.py": "eval(text)"}),
    (unsafe_code, {"slipstream/core/a.py": "run = exec"}),
    (unsafe_code, {"slipstream/core/a.py": "torch.load(path, weights_only=True)"}),
    (unsafe_code, {"slipstream/core/a.py": "from torch import load"}),
    (unsafe_code, {"slipstream/core/a.py": "subprocess.run(line, shell=True)"}),
    (unsafe_code, {"slipstream/core/a.py": "numpy.load(path, allow_pickle=flag)"}),
    (unsafe_code, {"slipstream/core/a.py": "socket.recv_pyobj()"}),
    (unsafe_code, {"slipstream/core/a.py": "dist.broadcast_object_list(things)"}),
    (oversized, {"slipstream/engine/a.py": "x = 1\n" * (MAX_FILE_LINES + 1)}),
    (oversized, {"slipstream/kernels/a.py": "x = 1\n" * (MAX_KERNEL_FILE_LINES + 1)}),
    (oversized, {"slipstream/core/a.py": function_of(MAX_FUNCTION_LINES + 1)}),
    (oversized, {"slipstream/core/a.py": "async " + function_of(MAX_FUNCTION_LINES + 1)}),
    (unanswered_questions, {"slipstream/core/a.py": "x = 1"}),
    (logic_in_tables, {"slipstream/quant/__init__.py": "def get(name):\n    return TABLE[name]"}),
]


@pytest.mark.parametrize(("check", "files"), VIOLATIONS)
def test_check_sees_a_violation(check: Check, files: Files) -> None:
    assert len(check(files)) == 1


ALLOWED: Files = {
    "slipstream/__init__.py": '"""Doc."""\ndef __getattr__(name):\n    return name',
    "slipstream/quant/__init__.py": "",
    "slipstream/models/llama.py": '"""The Llama family."""\nmodel.eval()\nregex = re.compile("x")',
    "slipstream/checkpoint/gguf_types.py": '"""Doc."""',
    "slipstream/models/v_head.py": '"""Doc."""\n' + function_of(MAX_FUNCTION_LINES),
    "slipstream/kernels/gemm.py": '"""Doc."""\n' + "x = 1\n" * (MAX_KERNEL_FILE_LINES - 1),
    "slipstream/engine/a.py": '"""Doc."""\nsubprocess.run(["ls"], shell=False)',
}


@pytest.mark.parametrize("check", CHECKS)
def test_check_accepts_what_is_allowed(check: Check) -> None:
    assert check(ALLOWED) == []
