"""The code as the rules of this folder see it: modules by name, each with what it imports.

A rule is a function of modules that returns its findings, one line each. So every rule is also tried on a planted
violation: on modules that a test writes down (`parsed`).
"""

from __future__ import annotations

import ast
import functools
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {Path(path).name: ROOT / path for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}


@dataclass(frozen=True, slots=True)
class Import:
    """`name` is the module that is imported; of `from a import b` it is a.b if that is one of our modules, else a."""

    line: int
    name: str
    is_for_types: bool  # under `if TYPE_CHECKING`: never run


@dataclass(frozen=True, slots=True)
class Module:
    """`defines`: the names that the module gives a value or a body at its top level, with their lines."""

    name: str
    imports: tuple[Import, ...]
    defines: tuple[tuple[str, int], ...] = ()

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


Modules = Mapping[str, Module]


def within(name: str, homes: Iterable[str]) -> bool:
    """Returns True if a module is one of `homes`, or lies in one."""
    return any(name == home or name.startswith(f"{home}.") for home in homes)


@functools.cache
def our_modules() -> Modules:
    """Returns all modules of the packages that are in the wheel."""
    sources = {}
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            sources[".".join(parts)] = path.read_text()
    return parsed(sources)


def parsed(sources: Mapping[str, str]) -> Modules:
    """Returns the modules of these sources; that of a package is called package.__init__ there, and package here."""
    names = {name.removesuffix(".__init__") for name in sources}
    modules = {}
    for full, source in sources.items():
        name, tree = full.removesuffix(".__init__"), ast.parse(source)
        modules[name] = Module(name, tuple(_imports(tree, full.split(".")[:-1], names)), tuple(_definitions(tree)))
    return modules


def _definitions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields the names that a module assigns or defines itself, not those that it imports."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from ((part.id, node.lineno) for part in ast.walk(target) if isinstance(part, ast.Name))


def _imports(node: ast.AST, folder: list[str], names: set[str], is_for_types: bool = False) -> Iterator[Import]:
    """Yields the imports of a module in the package `folder`, those inside functions, too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(child.lineno, alias.name, is_for_types)
        elif isinstance(child, ast.ImportFrom):
            above = folder[: len(folder) + 1 - child.level] if child.level else []
            module = ".".join([*above, *([child.module] if child.module else [])])
            for alias in child.names:
                full = f"{module}.{alias.name}"
                yield Import(child.lineno, full if full in names else module, is_for_types)
        else:
            types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports(child, folder, names, is_for_types or types)
