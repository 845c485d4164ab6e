"""Dataclasses of more than three fields are made by keyword: two integers that change places pass every other check."""

import ast
from collections.abc import Iterator, Mapping

import pytest

from tests.structure.modules import PACKAGES

pytestmark = pytest.mark.quick

POSITIONAL_MAX = 3


def trees() -> dict[str, ast.Module]:
    """Returns all modules of the wheel, by path within their package's folder."""
    return {
        path.relative_to(folder.parent).as_posix(): ast.parse(path.read_text())
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
    }


def _dataclasses(tree: ast.AST) -> Iterator[tuple[ast.ClassDef, bool]]:
    """Yields the dataclasses, each with True if it takes keywords only."""
    for node in _statements(tree):
        if isinstance(node, ast.ClassDef):
            for decorator in node.decorator_list:
                call = decorator.func if isinstance(decorator, ast.Call) else decorator
                if ast.unparse(call).split(".")[-1] == "dataclass":
                    words = decorator.keywords if isinstance(decorator, ast.Call) else []
                    yield node, any(word.arg == "kw_only" and ast.unparse(word.value) == "True" for word in words)


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yields all statements below a node. `ast.walk` also visits each name and number: twenty times as many nodes."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(tree, field, ()):
            if isinstance(child, ast.stmt):
                yield child
            yield from _statements(child)


def _is_taken(statement: ast.stmt) -> bool:
    """True for a field that the constructor takes."""
    if not isinstance(statement, ast.AnnAssign) or "ClassVar" in ast.unparse(statement.annotation):
        return False
    value = statement.value
    words = value.keywords if isinstance(value, ast.Call) and ast.unparse(value.func) == "field" else []
    return not any(word.arg == "init" and ast.unparse(word.value) == "False" for word in words)


def positional_rows(found: Mapping[str, ast.Module]) -> list[str]:
    """Returns the dataclasses that take more than POSITIONAL_MAX fields by position."""
    return [
        f"{name}:{node.lineno} {node.name} takes {count} fields by position: kw_only=True"
        for name, tree in found.items()
        for node, by_keyword in _dataclasses(tree)
        if (count := sum(map(_is_taken, node.body))) > POSITIONAL_MAX and not by_keyword
    ]


def test_dataclasses_are_made_by_keyword() -> None:
    found = trees()
    assert sum(len(list(_dataclasses(tree))) for tree in found.values()) > 100, "the rule sees rows"
    assert not (rows := positional_rows(found)), "\n".join(rows)


def test_a_planted_dataclass_is_seen() -> None:
    fields = "    a: int\n    b: int\n    c: int\n"
    planted = (
        f"@dataclass(frozen=True)\nclass Row:\n{fields}    d: int = 0\n"
        f"@dataclasses.dataclass\nclass Other:\n{fields}    d: int\n    e: int\n"
        f"@dataclass(kw_only=True)\nclass ByKeyword:\n{fields}    d: int\n"
        f"@dataclass\nclass Few:\n{fields}    d: ClassVar[int] = 0\n    e: int = field(init=False)\n"
        f"class Plain:\n{fields}    d: int\n"
    )
    assert positional_rows({"p/rows.py": ast.parse(planted)}) == [
        "p/rows.py:2 Row takes 4 fields by position: kw_only=True",
        "p/rows.py:8 Other takes 5 fields by position: kw_only=True",
    ]
