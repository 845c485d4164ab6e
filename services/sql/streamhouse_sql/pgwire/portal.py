"""Portals: results that a client takes in parts.

Owns: the query that is open behind a portal. Does not own: names of portals (statements.py), the socket.
Invariants: a query is opened with the first rows that are asked for. Rows come in their order, each once. After `close`
the query holds no turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

from streamhouse_sql.pgwire.core import protocol
from streamhouse_sql.pgwire.core.errors import PgError
from streamhouse_sql.pgwire.core.types import ColumnType, column_type
from streamhouse_sql.pgwire.values import data_rows
from streamhouse_sql.service import OpenQuery

# Rows that are encoded in the event loop: a thread would take longer to be woken.
INLINE_ROWS = 64
# Of Arrow columns that are encoded at once.
CHUNK_BYTES = 1024 * 1024
# PostgreSQL's own limit; the protocol counts columns in 16 bits.
COLUMNS_MAX = 1_664


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a result."""

    name: str
    type: ColumnType


def columns_of(described: Sequence[tuple[str, str]]) -> list[Column]:
    """Returns the columns of a result, given names and DuckDB types. Raises PgError for too many."""
    if len(described) > COLUMNS_MAX:
        raise PgError("54011", f"the result has {len(described)} columns, the most are {COLUMNS_MAX}")
    return [Column(name, column_type(kind)) for name, kind in described]


def row_description(columns: Sequence[Column], formats: Sequence[int]) -> bytes:
    """Returns RowDescription."""
    return protocol.row_description(
        [
            protocol.Field(name=column.name, oid=column.type.oid, size_bytes=column.type.size_bytes, format=form)
            for column, form in zip(columns, formats, strict=True)
        ]
    )


class Source(Protocol):
    """Gives a portal its rows."""

    columns: list[Column]

    async def next(self) -> Any:
        """Returns the next `pyarrow.RecordBatch`, None at the end."""

    async def close(self) -> None:
        """Ends it. Idempotent."""


class Batches:
    """Rows that are there already."""

    def __init__(self, columns: list[Column], batches: Sequence[Any]) -> None:
        self.columns = columns
        self._batches = list(batches)

    async def next(self) -> Any:
        return self._batches.pop(0) if self._batches else None

    async def close(self) -> None:
        self._batches.clear()


class QueryRows:
    """Rows of a query of the SQL service."""

    def __init__(self, query: OpenQuery) -> None:
        self._query = query
        self.columns = columns_of(query.columns)

    async def next(self) -> Any:
        return await self._query.next()

    async def close(self) -> None:
        await self._query.close()


class Portal:
    """A result, taken in parts. `columns` None: known once the portal is open."""

    def __init__(
        self, open_source: Callable[[], Awaitable[Source]], columns: list[Column] | None, *, is_hold: bool = False
    ) -> None:
        self._open_source = open_source
        self._source: Source | None = None
        self._rest: Any = None
        self.columns = columns
        self.is_hold = is_hold
        self._is_over = False

    async def open(self) -> list[Column]:
        """Opens the query unless it is open. Returns its columns."""
        if self._source is None:
            self._source = await self._open_source()
            found = self._source.columns
            if self.columns is not None and [column.type for column in found] != [c.type for c in self.columns]:
                await self.close()
                raise PgError("0A000", "cached plan must not change result type")
            self.columns = found
        assert self.columns is not None, "open"
        return self.columns

    async def take(self, rows_max: int | None) -> AsyncIterator[Any]:
        """Yields record batches of at most `rows_max` rows together, and of about CHUNK_BYTES each."""
        await self.open()
        left = rows_max
        while left is None or left > 0:
            if self._rest is None:
                assert self._source is not None, "open"
                self._rest = None if self._is_over else await self._source.next()
            if self._rest is None:
                self._is_over = True
                return
            batch = self._rest
            count = batch.num_rows if left is None else min(left, batch.num_rows)
            if batch.nbytes > CHUNK_BYTES:
                count = max(1, min(count, batch.num_rows * CHUNK_BYTES // batch.nbytes))
            self._rest = batch.slice(count) if count < batch.num_rows else None
            left = None if left is None else left - count
            if count:
                yield batch.slice(0, count)

    async def close(self) -> None:
        """Ends the query. Idempotent."""
        self._is_over, self._rest = True, None
        if self._source is not None:
            await self._source.close()


async def encode(batch: Any, columns: Sequence[Column], formats: Sequence[int], threads: Executor) -> bytes:
    """Returns a batch as DataRow messages."""
    types = [column.type for column in columns]
    if batch.num_rows <= INLINE_ROWS:
        return data_rows(batch, types, formats)
    return await asyncio.get_running_loop().run_in_executor(threads, data_rows, batch, types, formats)
