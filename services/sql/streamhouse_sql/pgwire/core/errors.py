"""Errors as PostgreSQL's clients know them: SQLSTATE, message, position in the text."""

from __future__ import annotations

import re

from shproto.errors import (
    DataLoss,
    InvalidArgument,
    InvalidStatement,
    Overloaded,
    ShuttingDown,
    StatementFailed,
    StatementLimit,
    StatementTimeout,
    StreamHouseError,
    TableExists,
    Unavailable,
    UnknownTable,
    UnknownTopic,
)


class PgError(Exception):
    """An error with its SQLSTATE. `position`: of the character in the statement, from 1; 0: unknown. `is_fatal`: the
    connection ends with it."""

    def __init__(
        self,
        sqlstate: str,
        message: str,
        *,
        detail: str = "",
        hint: str = "",
        position: int = 0,
        is_fatal: bool = False,
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.message = message
        self.detail = detail
        self.hint = hint
        self.position = position
        self.is_fatal = is_fatal


# Words of DuckDB's messages about a statement → SQLSTATE.
_STATEMENT = (
    (re.compile(r"column .* (not found|does not have|does not exist)|Referenced column", re.IGNORECASE), "42703"),
    (re.compile(r"ambiguous reference", re.IGNORECASE), "42702"),
    (re.compile(r"must appear in the GROUP BY|cannot contain aggregates|aggregate", re.IGNORECASE), "42803"),
    (re.compile(r"function .* (does not exist|with name)|No function matches", re.IGNORECASE), "42883"),
    (re.compile(r"Cannot (compare|cast|mix)|Could not convert|type", re.IGNORECASE), "42804"),
)
_FAILED = (
    (re.compile(r"Could not convert string|invalid (date|time|timestamp|input)", re.IGNORECASE), "22P02"),
    (re.compile(r"out of range|overflow", re.IGNORECASE), "22003"),
    (re.compile(r"division by zero", re.IGNORECASE), "22012"),
)
_SQLSTATES: tuple[tuple[type[StreamHouseError], str], ...] = (
    (UnknownTopic, "42P01"),
    (UnknownTable, "42P01"),
    (TableExists, "42P07"),
    (InvalidArgument, "54000"),
    (StatementLimit, "53000"),
    (StatementTimeout, "57014"),
    (Overloaded, "53000"),
    (ShuttingDown, "57P01"),
    (Unavailable, "58000"),
    (DataLoss, "XX001"),
)


def from_ours(error: StreamHouseError, text: str, *, shift: int = 0) -> PgError:
    """Returns an error of the SQL service as PostgreSQL's. `text`: the statement; `shift`: characters of the client's
    text before it."""
    position = _position(error, text)
    return PgError(_sqlstate(error), error.message, position=shift + position if position else 0, detail=_detail(error))


def _sqlstate(error: StreamHouseError) -> str:
    if isinstance(error, InvalidStatement):
        if "name" in error.details:
            return "42P01"
        if "clause" in error.details:
            return "0A000"
        found = [state for pattern, state in _STATEMENT if pattern.search(error.message)]
        return found[0] if found else "42601"
    if isinstance(error, StatementFailed):
        found = [state for pattern, state in _FAILED if pattern.search(error.message)]
        return found[0] if found else "22000"
    return next((state for kind, state in _SQLSTATES if isinstance(error, kind)), "XX000")


def _detail(error: StreamHouseError) -> str:
    names = ("limit", "value", "partition", "offset")
    return ", ".join(f"{name} {error.details[name]}" for name in names if name in error.details)


def _position(error: StreamHouseError, text: str) -> int:
    line, column = error.details.get("line", ""), error.details.get("column", "")
    if not (line.isdigit() and column.isdigit()):
        return 0
    before = text.split("\n")[: int(line) - 1]
    return sum(len(part) + 1 for part in before) + int(column)
