"""Ends of tasks are awaited in one place: shruntime.tasks."""

import ast
from collections.abc import Iterator, Mapping

import pytest

from tests.structure.modules import PACKAGES

pytestmark = pytest.mark.quick

HOME = "shruntime/tasks.py"


def sources() -> dict[str, str]:
    """Returns the text of all modules of the wheel, by path within their package's folder."""
    return {
        path.relative_to(folder.parent).as_posix(): path.read_text()
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
    }


def _gathers_errors(tree: ast.AST) -> Iterator[int]:
    """Yields the lines of calls of `gather` with return_exceptions, whatever its value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and any(word.arg == "return_exceptions" for word in node.keywords):
            yield node.lineno


def gathered_by_hand(found: Mapping[str, str]) -> list[str]:
    """Returns the places outside of shruntime.tasks that collect errors of tasks themselves."""
    return [
        f"{name}:{line} gathers with return_exceptions: use cancel_and_wait or outcomes of shruntime.tasks"
        for name, source in found.items()
        if name != HOME
        for line in _gathers_errors(ast.parse(source))
    ]


def test_errors_of_tasks_are_gathered_in_one_place() -> None:
    found = sources()
    assert len(found) > 200 and list(_gathers_errors(ast.parse(found[HOME]))), "the rule sees its own home"
    assert gathered_by_hand(found) == []


def test_a_planted_gather_is_seen() -> None:
    planted = "import asyncio\nasync def stop(tasks):\n    await asyncio.gather(*tasks, return_exceptions=True)\n"
    assert gathered_by_hand({HOME: planted, "streamhouse_query/api.py": planted}) == [
        "streamhouse_query/api.py:3 gathers with return_exceptions: use cancel_and_wait or outcomes of shruntime.tasks"
    ]
    assert gathered_by_hand({"streamhouse_query/api.py": "await_all = asyncio.gather(*tasks)\n"}) == []
