"""The rooms of the house: imports go only downwards, in the order that CONTRIBUTING.md states."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlspec
import rlspec.kernels

PACKAGE, KERNELS = Path(rlspec.__file__).parent, Path(rlspec.kernels.__file__).parent
CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"
# Above everything: the public names, which a room below must not go through.
FACADE = "rlspec itself"


def order() -> dict[str, int]:
    """Room to level, the lowest 0, as CONTRIBUTING.md has it: levels apart by <, rooms of one level by commas."""
    (stated,) = re.findall(r"```\n(.+?<.+?)\n```", CONTRIBUTING.read_text(), re.DOTALL)
    return {room.strip(): i for i, level in enumerate(stated.split("<")) for room in level.split(",")}


def modules() -> Iterator[tuple[str, Path]]:
    """Name and file of every module, packages by their own name."""
    for root, name in ((PACKAGE, "rlspec"), (KERNELS, "rlspec.kernels")):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join((name, *(part for part in parts if part != "__init__"))), path


def room(module: str) -> str:
    """The folder or file right below rlspec that a module lies in."""
    return module.split(".")[1] if "." in module else FACADE


def rooms() -> set[str]:
    return {room(name) for name, _ in modules()} - {FACADE}


def imported(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and room of everything of rlspec that a module imports, also late, or for its types alone."""
    known = rooms() | {"_C"}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: (1 if is_package else 0) - node.level or None] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__"):
                names = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
        for name in names:
            if name.split(".")[0] == "rlspec":
                found = room(name)
                yield node.lineno, found if found in known else FACADE


def upward(tree: ast.AST, module: str, *, is_package: bool = False) -> list[str]:
    """The imports of a module that do not go down, or go to another room of the same level."""
    levels, own = order(), room(module)
    return [
        f"{module}, line {line}: {own} imports {other}"
        for line, other in imported(tree, module, is_package=is_package)
        if other != own and not levels.get(other, len(levels)) < levels[own]
    ]


def test_every_room_has_a_place_in_the_order() -> None:
    assert rooms() - {"__main__"} <= order().keys()


def test_imports_go_only_downwards() -> None:
    found, files = [], 0
    for name, path in modules():
        if room(name) in (FACADE, "__main__"):  # the public names, and the start of the command
            continue
        files += 1
        found += upward(ast.parse(path.read_text()), name, is_package=path.name == "__init__.py")
    assert files > 150 and found == []


@pytest.mark.parametrize(
    ("module", "source", "other"),
    [
        ("rlspec.run.folder", "from rlspec.report.html import write_report", "report"),
        ("rlspec.io.weights", "def f():\n    import rlspec.spectra.basis", "spectra"),
        ("rlspec.io.weights", "if TYPE_CHECKING:\n    from rlspec.linalg import svd, rank", None),
        ("rlspec.io.weights", "if TYPE_CHECKING:\n    from rlspec import restore, _C", "restore"),
        ("rlspec.spectra.basis", "from ..restore import select", "restore"),
        ("rlspec.spectra.basis", "from .. import cli", "cli"),
        ("rlspec.spectra.basis", "from . import cache\nfrom .cache import x", None),
        ("rlspec.spectra", "from .cache import x\nfrom ..io import files", None),
        ("rlspec.spectra", "from ..train import loop", "train"),
        ("rlspec.spectra.basis", "import rlspec.tasks.env", "tasks"),  # of the same level
        ("rlspec.kernels.delta", "from rlspec.ops import delta_prep", "ops"),
        ("rlspec.run.rows", "importlib.import_module('rlspec.jobs.track')", "jobs"),
        ("rlspec.run.rows", "from rlspec import svd", FACADE),
        ("rlspec.run.rows", "import rlspec", FACADE),
        ("rlspec.run.rows", "import rlspecial\nfrom torch import rlspec", None),
    ],
)
def test_the_search_would_notice_a_planted_import(module: str, source: str, other: str | None) -> None:
    found = upward(ast.parse(source), module, is_package=module == "rlspec.spectra")
    assert [text.rsplit(" imports ")[-1] for text in found] == ([] if other is None else [other])
