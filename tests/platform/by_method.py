"""Faults and counts by method. A misspelt name is an error: it would be a fault that never happens, or a count that is
always 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByMethod(dict[str, Value], Generic[Value]):
    """A value for each method, `new()` at first use. Raises KeyError for a name for which `is_method` returns False."""

    def __init__(self, is_method: Callable[[str], bool], new: Callable[[], Value]) -> None:
        super().__init__()
        self._is_method = is_method
        self._new = new

    def __missing__(self, method: str) -> Value:
        self[method] = value = self._new()
        return value

    def __setitem__(self, method: str, value: Value) -> None:
        self._check(method)
        super().__setitem__(method, value)

    def __contains__(self, method: object) -> bool:
        self._check(str(method))
        return super().__contains__(method)

    def _check(self, method: str) -> None:
        if not self._is_method(method):
            raise KeyError(f"no method is called {method!r}")
