"""The import graph of the three packages, read from the source by AST: function-local imports count like others."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[2]
ROOTS = {"trichord": REPO / "pretrain", "trichord_kernels": REPO / "kernels", "trichord_launch": REPO / "launch"}


def project() -> dict:
    """The `[project]` table of pyproject.toml."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10, where pytest brings it
        import tomli as tomllib
    return tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


class Import(NamedTuple):
    """One import: `module` (dotted) at `line` of `importer`."""

    importer: str
    line: int
    module: str


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages and its file."""
    found = {}
    for package, root in ROOTS.items():
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports() -> list[Import]:
    """Every import in every module."""
    return [found for name, file in modules().items() for found in imports_in(name, file.read_text(), set(modules()))]


def imports_in(importer: str, source: str, known: set[str]) -> list[Import]:
    """The imports in `source`; `from a import b` is an import of `a.b` where that is a module, else of `a`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(importer, node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno}: imports are absolute in this project"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
            targets = {name if name in known else base for name in names}
            found += [Import(importer, node.lineno, target) for target in sorted(targets)]
    return found


def find_cycle(edges: dict[str, set[str]]) -> list[str] | None:
    """Some cycle of a directed graph as a list that ends where it starts, or None."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(node: str) -> list[str] | None:
        state[node] = 1
        path.append(node)
        for target in sorted(edges.get(node, ())):
            if state.get(target) == 1:
                return [*path[path.index(target) :], target]
            if target not in state and (cycle := visit(target)):
                return cycle
        path.pop()
        state[node] = 2
        return None

    for node in sorted(edges):
        if node not in state and (cycle := visit(node)):
            return cycle
    return None
