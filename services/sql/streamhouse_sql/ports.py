"""The engine that computes statements, as they see it; adapters/duck.py is DuckDB."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol


class Source(Protocol):
    """A table for an engine: an Arrow stream, opened anew each time that a plan reads the table."""

    def __arrow_c_schema__(self) -> Any: ...

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any: ...


class Interrupted(Exception):
    """The statement was interrupted."""


class Engine(Protocol):
    """Computes a statement. Its calls block, and raise InvalidStatement, StatementFailed, StatementLimit, and
    Interrupted once `interrupt` was called from another thread."""

    def add_table(self, name: str, source: Source) -> None: ...

    def timestamp_ms(self, expression: str) -> int | None: ...

    def result(self, sql: str, rows_max: int) -> tuple[Any, Iterator[Any]]: ...

    def typed_result(
        self, sql: str, values: Mapping[str, object], rows_max: int, cast: Callable[[str], str]
    ) -> tuple[list[tuple[str, str]], Iterator[Any]]: ...

    def columns(self, sql: str, values: Mapping[str, object] = ...) -> list[tuple[str, str]]: ...

    def plan(self, sql: str) -> str: ...

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


class JobEngine(Protocol):
    """Computes a continuous query: an instance with one thread, whose tables are the query's state. Its calls block,
    and raise InvalidStatement, StatementFailed, StatementLimit, and Interrupted once `interrupt` was called."""

    @property
    def version(self) -> str: ...

    def add_table(self, name: str, source: Source) -> None: ...

    def remove_table(self, name: str) -> None: ...

    def run(self, sql: str) -> None: ...

    def fetch(self, sql: str, values: Sequence[object] = ...) -> Any: ...

    def columns(self, sql: str, values: Mapping[str, object] = ...) -> list[tuple[str, str]]: ...

    def roll_back(self) -> None: ...

    def cursor(self) -> JobEngine: ...

    def interrupt(self) -> None: ...

    def close(self) -> None: ...
