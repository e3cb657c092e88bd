"""Does the documentation name only what exists? Files, symbols, make targets, and Python that parses.

Read are the prose files at the root, `docs/` and the README of every room. What stands in single backticks
is checked where it can only mean one thing: a path of this repository, or a dotted name whose head is the
package, a room, a file of the README's own room, or a class of ours. All of it is looked up in the source
text, so that nothing is imported. Each check is itself tested with text that breaks its rule.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "slipstream"
MAX_ROOM_README_LINES = 15

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *PACKAGE.rglob("README.md")],
    key=lambda path: path.as_posix(),
)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
PATH = re.compile(r"\.?[\w-]+(\.[\w-]+)*(/[\w.-]+)*/?")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
MAKE = re.compile(r"(?:^|\s)make ([a-z][a-z-]*)")
PROSE_FILE = re.compile(r"[\w.-]+\.(py|md)")


def relative_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose_of(text: str) -> str:
    return FENCE.sub("", text)


def blocks_of(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def top_folders() -> set[str]:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    return rooms | {path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in UNTRACKED}


# Made by the make targets, so absent from a clean clone.
UNTRACKED = {".venv", ".models", ".cache", ".git"}


def missing_paths(text: str, folder: Path) -> list[str]:
    """Return the backticked paths that exist neither from the root, the package, nor `folder`."""
    found: list[str] = []
    for token in INLINE_CODE.findall(prose_of(text)):
        is_bare_file = PROSE_FILE.fullmatch(token) is not None
        is_path = PATH.fullmatch(token) is not None and "/" in token and token.split("/")[0] in top_folders()
        if not (is_bare_file or is_path):
            continue
        exists = any((base / token).exists() for base in (ROOT, PACKAGE, folder))
        # `base.py` without a folder speaks of that file in any room.
        if not exists and not (is_bare_file and token in tracked_file_names()):
            found.append(token)
    return found


@cache
def tracked_file_names() -> frozenset[str]:
    folders = [PACKAGE, ROOT / "tests", ROOT / "docs", ROOT / "tools", ROOT / "examples"]
    return frozenset(path.name for folder in folders for path in folder.rglob("*.*"))


def missing_links(text: str, folder: Path) -> list[str]:
    links = [link for link in LINK.findall(prose_of(text)) if "://" not in link]
    return [link for link in links if not (folder / link).exists()]


@cache
def modules() -> dict[str, ast.Module]:
    """Every file of the package by its dotted name."""
    return {
        relative_name(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in PACKAGE.rglob("*.py")
    }


@cache
def class_members() -> dict[str, set[str]]:
    """Class name -> names of its methods, fields and attributes; classes that share a name share a row."""
    members: dict[str, set[str]] = {}
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                members.setdefault(node.name, set()).update(member_names(node))
    return members


def member_names(node: ast.ClassDef) -> Iterator[str]:
    yield from defined_names(node.body)
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
            yield part.attr


def defined_names(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Assign(targets=targets):
                yield from (
                    part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)
                )
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from ((alias.asname or alias.name).split(".")[0] for alias in names)
            case ast.If(body=inner):
                yield from defined_names(inner)


def is_known(dotted: str) -> bool:
    """Tell whether `slipstream.a.b.C.d` is a folder, a file, a name in one, or a member of a class."""
    parts = dotted.split(".")
    length = len(parts)
    while length and ".".join(parts[:length]) not in modules():
        if ROOT.joinpath(*parts[:length]).is_dir():
            return length == len(parts)
        length -= 1
    rest = parts[length:]
    if not rest:
        return True
    tree = modules().get(".".join(parts[:length]))
    if tree is None or rest[0] not in set(defined_names(tree.body)):
        return False
    return len(rest) == 1 or rest[1] in class_members().get(rest[0], set())


def unknown_symbols(text: str, folder: Path) -> list[str]:
    found: list[str] = []
    for code in INLINE_CODE.findall(prose_of(text)):
        token = re.sub(r"\(.*\)$", "", code)
        if not DOTTED.fullmatch(token) or PROSE_FILE.fullmatch(token):
            continue
        head, _, member = token.partition(".")
        if head in class_members():
            known = member.split(".")[0] in class_members()[head]
        elif head == "slipstream":
            known = is_known(token)
        elif folder.parent == PACKAGE and (folder / f"{head}.py").is_file():
            known = is_known(f"slipstream.{folder.name}.{token}")
        elif (PACKAGE / head).is_dir():
            known = is_known(f"slipstream.{token}")
        else:
            continue
        if not known:
            found.append(token)
    return found


def broken_python(text: str) -> list[str]:
    """Return what is wrong with the fenced Python: syntax, or a name that the package does not have."""
    found: list[str] = []
    for body in blocks_of(text, "python", "py"):
        try:
            tree = ast.parse(body)
        except SyntaxError as error:
            found.append(f"{error.msg} in {body.splitlines()[(error.lineno or 1) - 1]!r}")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "slipstream":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [f"no {name}" for name in names if not is_known(name)]
    return found


def unknown_targets(text: str) -> list[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    code = [*INLINE_CODE.findall(prose_of(text)), *blocks_of(text, "", "bash", "sh", "console")]
    return [target for piece in code for target in MAKE.findall(piece) if target not in targets]


def problems(text: str, folder: Path) -> list[str]:
    return [
        *(f"no such file: {path}" for path in missing_paths(text, folder)),
        *(f"no such symbol: {symbol}" for symbol in unknown_symbols(text, folder)),
        *(f"dead link: {link}" for link in missing_links(text, folder)),
        *(f"broken Python: {what}" for what in broken_python(text)),
        *(f"no such target: make {target}" for target in unknown_targets(text)),
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative_name)
def test_document_names_only_what_exists(document: Path) -> None:
    found = problems(document.read_text(encoding="utf-8"), document.parent)
    assert not found, f"{relative_name(document)}: " + "; ".join(found)


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if PACKAGE in path.parents], ids=relative_name
)
def test_room_readme_fits_a_glance(document: Path) -> None:
    assert len(document.read_text(encoding="utf-8").splitlines()) <= MAX_ROOM_README_LINES


def test_every_room_has_a_readme() -> None:
    rooms = {path.parent for path in PACKAGE.glob("*/*.py") if path.name != "__init__.py"}
    missing = sorted(relative_name(room) for room in rooms if not (room / "README.md").is_file())
    assert not missing, (
        f"no README.md in {', '.join(missing)}: say what the room answers, its invariants, how to add"
    )


def test_readme_shows_how_to_run_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`engine/no_such_file.py`", "no such file: engine/no_such_file.py"),
        ("`slipstream/no_such_room.py`", "no such file: slipstream/no_such_room.py"),
        ("`docs/nothing.md`", "no such file: docs/nothing.md"),
        ("`no_such_file.py`", "no such file: no_such_file.py"),
        ("`slipstream.core.plan.NoSuchPlan`", "no such symbol: slipstream.core.plan.NoSuchPlan"),
        ("`slipstream.NoSuchName`", "no such symbol: slipstream.NoSuchName"),
        ("`core.plan.StepPlan.colour`", "no such symbol: core.plan.StepPlan.colour"),
        ("`core.nothing`", "no such symbol: core.nothing"),
        ("`StepPlan.colour`", "no such symbol: StepPlan.colour"),
        ("`plan.decode_nothing(data)`", "no such symbol: plan.decode_nothing"),
        ("[here](nowhere.md#part)", "dead link: nowhere.md"),
        ("```python\nx = = 1\n```\n", "broken Python: invalid syntax in 'x = = 1'"),
        ("```python\nfrom slipstream import Nothing\n```\n", "broken Python: no slipstream.Nothing"),
        ("`make nothing`", "no such target: make nothing"),
        ("```bash\ncd x && make nothing\n```\n", "no such target: make nothing"),
    ],
)
def test_check_sees_a_problem(text: str, problem: str) -> None:
    assert problems(text, PACKAGE / "core") == [problem]


@pytest.mark.parametrize(
    "text",
    [
        "`core/plan.py` and `core/`, `slipstream/core/plan.py`, `plan.py`, `tests/core/`, `docs/glossary.md`",
        "`slipstream.core.plan.StepPlan.num_tokens`, `core.errors.nearest`, `slipstream.SamplingParams`",
        "`StepPlan.spans`, `plan.encode(record)`, `slipstream.core`, `Registry.register()`, `Registry.kind`",
        "`prefill/decode`, `/v1/completions`, `config.json`, `torch.library`, `tests/<room>/test_<file>.py`",
        "`.models/model.gguf`, `0.5`, `a.b`, `*.md`, `make test`, `make demo TORCH_INDEX=url`",
        "[web](https://example.org/x.md), ```python\nno python = here",
        "```python\nfrom slipstream import SamplingParams\n```\n```\nengine/nothing.py\n```\n",
    ],
)
def test_check_accepts_what_exists(text: str) -> None:
    assert problems(text, PACKAGE / "core") == []
