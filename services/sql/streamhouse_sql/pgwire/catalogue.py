"""PostgreSQL's catalogue: an instance of DuckDB that has its tables and functions, and the topics of the moment.

Owns: the instance, which plans statements, too, for clients that ask for a result's columns before they run it. Does
not own: the rows (catalogue_rows.py), how clients' queries are read (catalogue_queries.py).
Invariants: a table is made when it is first read, and made anew once the topics have changed. The instance has nothing
but the catalogue: a query of it reaches no topic, file or setting. It holds no statement's turn, and so has limits of
its own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import pyarrow as pa
from shproto.errors import InvalidStatement, StatementLimit, StatementTimeout, StreamHouseError

from streamhouse_sql.arrow import schema_of
from streamhouse_sql.core.binding import WRITTEN_IN, BoundQuery, with_suggestion
from streamhouse_sql.core.parameters import Parameters, tables_named, typed
from streamhouse_sql.core.quoting import quoted
from streamhouse_sql.core.statement import query_of_table
from streamhouse_sql.core.tables import TableDefinition
from streamhouse_sql.pgwire.core import catalogue_rows
from streamhouse_sql.pgwire.core.catalogue_queries import (
    MACRO_TABLES,
    SCHEMA,
    CatalogueQuery,
    macros,
    over_session_tables,
    query_of,
    table_name,
)
from streamhouse_sql.pgwire.core.catalogue_rows import (
    SHAPES,
    SHOWN_TYPES,
    TOPIC_COLUMNS,
    Relation,
    RelationColumn,
    Relations,
    Row,
    Shape,
)
from streamhouse_sql.pgwire.core.session import Session
from streamhouse_sql.pgwire.core.types import cast_of
from streamhouse_sql.ports import Engine
from streamhouse_sql.service import SqlService

log = logging.getLogger(__name__)
T = TypeVar("T")

# Queries of the catalogue read some thousand rows; none that a client needs takes longer.
TIMEOUT_MS = 30_000
RESULT_BYTES_MAX = 32 * 1024 * 1024
_BATCH_ROWS = 16_384
_INTERRUPT_AGAIN_S = 0.05
_ARROW_TYPES = {
    "bool": pa.bool_(), "int2": pa.int16(), "int4": pa.int32(), "int8": pa.int64(), "oid": pa.uint32(),
    "text": pa.string(), "float4": pa.float32(), "float8": pa.float64(), "timestamptz": pa.timestamp("us", "UTC"),
    "bytea": pa.binary(), "interval": pa.string(),
}  # fmt: skip


class CatalogueEngine(Engine, Protocol):
    """An engine that keeps tables of its own, and takes several connections."""

    def run(self, sql: str) -> None: ...

    def make_table(self, name: str, table: Any) -> None: ...

    def cursor(self) -> CatalogueEngine: ...


class Catalogue:
    """The catalogue of one server. `close` waits for its queries."""

    def __init__(self, service: SqlService, new_engine: Callable[[], CatalogueEngine], threads: Executor) -> None:
        self._service = service
        self._new_engine = new_engine
        self._threads = threads
        self._duck: CatalogueEngine | None = None
        # Guards the tables and the instance, in its threads.
        self._lock = threading.Lock()
        self._made: dict[tuple[str, str], Relations] = {}
        # Columns of declared tables, by the text of the definition.
        self._columns: dict[str, tuple[RelationColumn, ...]] = {}
        self._running: set[asyncio.Future[Any]] = set()

    async def close(self) -> None:
        """Waits for the queries, whose callers have been cancelled, and closes the instance."""
        if self._running:
            await asyncio.wait(self._running)
        duck, self._duck = self._duck, None
        if duck is not None:
            duck.close()

    def query_of(
        self, text: str, session: Session, process_id: int, cursors: Sequence[str], statements: Sequence[str]
    ) -> CatalogueQuery | None:
        """Returns the query of the catalogue that `text` is, None for any other statement. Raises PgError."""
        query = query_of(text, session, process_id, ())
        if query is None:
            return None
        own: dict[str, list[Row]] = {}
        for _, name in query.tables:
            rows = catalogue_rows.session_rows(name, session.user, session.all(), cursors, statements)
            if rows is not None:
                own[name] = rows
        return replace(query, session_tables=own)

    async def describe(self, query: CatalogueQuery, parameters: Parameters) -> list[tuple[str, str]]:
        """Returns names and DuckDB types of a query's columns. Raises the errors of statements."""
        relations = await self._relations()
        return await self._in_thread(
            lambda duck: duck.columns(*self._bound(query, parameters, relations, duck)), TIMEOUT_MS
        )

    async def describe_bound(self, bound: BoundQuery) -> list[tuple[str, str]]:
        """Returns names and DuckDB types of the columns of a query over topics; nothing is read."""

        def described(duck: CatalogueEngine) -> list[tuple[str, str]]:
            for scan in bound.scans:
                duck.add_table(scan.name, schema_of(scan.columns or ("_offset",)).empty_table())
            for view in bound.views:
                columns = ", ".join(f"CAST(NULL AS {kind}) AS {quoted(name)}" for name, kind in view.columns)
                duck.run(f"CREATE TEMP TABLE {view.name} AS SELECT {columns} LIMIT 0")
            try:
                return duck.columns(bound.sql, bound.values)
            except InvalidStatement as error:
                raise InvalidStatement(with_suggestion(str(error), self._service.catalog.tables())) from error

        return await self._in_thread(described, TIMEOUT_MS)

    async def run(
        self, query: CatalogueQuery, parameters: Parameters, timeout_ms: int
    ) -> tuple[list[tuple[str, str]], list[Any]]:
        """Returns a query's columns, and its rows as record batches. Raises the errors of statements."""

        relations = await self._relations()

        def result(duck: CatalogueEngine) -> tuple[list[tuple[str, str]], list[Any]]:
            sql, values = self._bound(query, parameters, relations, duck)
            columns, batches = duck.typed_result(sql, values, _BATCH_ROWS, cast_of)
            found, size_bytes = [], 0
            for batch in batches:
                size_bytes += batch.nbytes
                if size_bytes > RESULT_BYTES_MAX:
                    raise StatementLimit(
                        f"the result of a query of the catalogue has more than {RESULT_BYTES_MAX} bytes",
                        limit="RESULT_BYTES_MAX",
                        value=size_bytes,
                    )
                found.append(batch)
            return columns, found

        return await self._in_thread(result, min(timeout_ms, TIMEOUT_MS))

    # ---- topics and declared tables

    async def _relations(self) -> Relations:
        """Returns topics and declared tables with their columns; a table hides a topic of the same name."""
        catalog = self._service.catalog
        tables = dict(catalog.tables())
        views = await self._service.views.known()
        hidden = {*tables, *views}
        found = [Relation(topic, TOPIC_COLUMNS) for topic in catalog.topics() if topic.lower() not in hidden]
        found += [
            Relation(name, tuple(RelationColumn(name=column, type=kind, not_null=False) for column, kind in columns))
            for name, columns in views.items()
        ]
        texts = {table.text for table in tables.values()}
        self._columns = {text: columns for text, columns in self._columns.items() if text in texts}
        for table in tables.values():
            columns = self._columns.get(table.text) or await self._columns_of(table)
            if columns:
                self._columns[table.text] = columns
            found.append(Relation(table.name, columns))
        return tuple(found)

    async def _columns_of(self, table: TableDefinition) -> tuple[RelationColumn, ...]:
        """Returns the columns of a declared table, none if it cannot be planned: its topic may be gone."""
        try:
            bound = await self._service.bind_all_columns(query_of_table(table.name), Parameters())
            described = await self.describe_bound(bound)
        except StreamHouseError as error:
            log.warning("the columns of table %s are not shown: %s", table.name, error)
            return ()
        required = {column.name for column in table.columns if column.not_null}
        return tuple(RelationColumn(name=name, type=kind, not_null=name in required) for name, kind in described)

    def column_types(self, tree: Any) -> dict[str, str]:
        """Returns the types of the columns that a query may name, as far as they are known, by name in small
        letters."""
        tables = self._service.catalog.tables()
        types = {column.name: column.type for column in TOPIC_COLUMNS}
        for name in tables_named(tree):
            definition = tables.get(name)
            if definition is not None:
                types |= {column.name.lower(): column.type for column in definition.columns if column.type}
        return types

    # ---- in a thread

    async def _in_thread(self, work: Callable[[CatalogueEngine], T], timeout_ms: int) -> T:
        """Returns the result of `work` with a connection of its own. A caller that is cancelled, or whose time is
        over, leaves once the work has ended."""
        opened: list[CatalogueEngine] = []

        def run() -> T:
            duck = self._instance().cursor()
            opened.append(duck)
            try:
                return work(duck)
            finally:
                opened.clear()
                duck.close()

        call = asyncio.get_running_loop().run_in_executor(self._threads, run)
        self._running.add(call)
        call.add_done_callback(self._running.discard)
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await asyncio.shield(call)
        except TimeoutError:
            await _interrupted(call, opened)
            raise StatementTimeout(f"not done within {timeout_ms} ms", timeout_ms=timeout_ms) from None
        except asyncio.CancelledError:
            await _interrupted(call, opened)
            raise

    def _instance(self) -> CatalogueEngine:
        with self._lock:
            if self._duck is None:
                self._duck = self._new_instance()
            return self._duck

    def _new_instance(self) -> CatalogueEngine:
        duck = self._new_engine()
        duck.run(f"CREATE SCHEMA {SCHEMA}")
        shown = {"oid": [oid for oid, _ in SHOWN_TYPES], "shown": [name for _, name in SHOWN_TYPES]}
        duck.make_table(
            f"{SCHEMA}.shown_types", pa.table(shown, schema=pa.schema({"oid": pa.uint32(), "shown": "str"}))
        )
        for place in MACRO_TABLES:  # a macro is made over tables that are there
            duck.make_table(f"{SCHEMA}.{table_name(place)}", _table(SHAPES[place], ()))
        for statement in macros():
            duck.run(statement)
        return duck

    def _bound(
        self, query: CatalogueQuery, parameters: Parameters, relations: Relations, duck: CatalogueEngine
    ) -> tuple[str, Mapping[str, object]]:
        """Returns SQL and values of a query, after its tables were made."""
        with self._lock:
            assert self._duck is not None, "made by _instance"
            for place in {*query.tables, *MACRO_TABLES}:
                shape = SHAPES[place]
                if place[1] in query.session_tables:
                    continue
                wanted = relations if catalogue_rows.depends_on_relations(shape) else ()
                if self._made.get(place) != wanted:
                    made = _table(shape, catalogue_rows.rows_of(shape, wanted))
                    self._duck.make_table(f"{SCHEMA}.{table_name(place)}", made)
                    self._made[place] = wanted
        own = {}
        for name, rows in query.session_tables.items():
            place = next(place for place in query.tables if place[1] == name)
            own[table_name(place)] = _table(SHAPES[place], rows)
        for name, table in own.items():
            duck.add_table(f"session_{name}", table)
        tree = over_session_tables(typed(query.tree, parameters.types), own)
        return tree.sql(WRITTEN_IN), parameters.named()


def _table(shape: Shape, rows: Sequence[Row]) -> Any:
    types = {name: _arrow_type(kind) for name, kind in shape.columns}
    return pa.table(catalogue_rows.filled(shape, rows), schema=pa.schema(types))


def _arrow_type(kind: str) -> Any:
    return pa.list_(_ARROW_TYPES[kind[:-2]]) if kind.endswith("[]") else _ARROW_TYPES[kind]


async def _interrupted(call: asyncio.Future[Any], opened: Sequence[CatalogueEngine]) -> None:
    """Ends the work of a thread, and waits for that. Its error is of no interest: the caller has one of its own."""
    while not call.done():
        for duck in list(opened):
            duck.interrupt()
        await asyncio.wait((call,), timeout=_INTERRUPT_AGAIN_S)
    if not call.cancelled():
        call.exception()
