"""Statements of a connection: prepared, bound to values, executed.

Owns: prepared statements and portals by name, cursors among them. Does not own: the socket, the session's settings.
Invariants: outside of a transaction no portal outlives its Sync, but for cursors WITH HOLD; the end of a transaction
closes the others. There are at most `sql_pg_statements_max` statements, and as many portals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from shproto.errors import StreamHouseError

from streamhouse_sql.core.continuous.statements import (
    AlterJob,
    ContinuousQuery,
    DropJob,
    ExplainContinuous,
    ShowJobs,
)
from streamhouse_sql.core.parameters import Parameters, inferred, numbers, unnamed_columns
from streamhouse_sql.core.statement import (
    CreateTable,
    Describe,
    DropTable,
    Explain,
    Query,
    ShowTables,
)
from streamhouse_sql.jobs.statements import JOB_COLUMNS, tag_of
from streamhouse_sql.pgwire.core import commands, protocol, types
from streamhouse_sql.pgwire.core.arguments import decoded, duck_type, formats_for
from streamhouse_sql.pgwire.core.catalogue_queries import CatalogueQuery
from streamhouse_sql.pgwire.core.commands import Piece
from streamhouse_sql.pgwire.core.errors import PgError, from_ours
from streamhouse_sql.pgwire.core.session import Session
from streamhouse_sql.pgwire.core.types import cast_of
from streamhouse_sql.pgwire.portal import (
    Batches,
    Column,
    Portal,
    QueryRows,
    Source,
    columns_of,
    encode,
    row_description,
)
from streamhouse_sql.service import AnyStatement, parse_any

if TYPE_CHECKING:
    from streamhouse_sql.pgwire.connection import Context

Send = Callable[[bytes], Awaitable[None]]
Plan = commands.Command | CatalogueQuery | AnyStatement
_TEXT = types.ColumnType(types.TEXT)
_OIDS = {"UINTEGER": types.ColumnType(types.OID), "UINTEGER[]": types.ColumnType(types.OID, True)}
_FIXED_COLUMNS = {
    Explain: [("plan", "VARCHAR")],
    ShowTables: [("name", "VARCHAR"), ("kind", "VARCHAR"), ("topic", "VARCHAR"), ("partitions", "INTEGER")],
    Describe: [("column_name", "VARCHAR"), ("column_type", "VARCHAR"), ("comment", "VARCHAR")],
    ExplainContinuous: [("plan", "VARCHAR")],
    ShowJobs: [(name, kind) for name, kind, _ in JOB_COLUMNS],
}


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A statement. `plan` None: an empty text. `oids`: types of its parameters. `columns` None: it has no result, or it
    was not described. `cursor_plan`: the query of a DECLARE."""

    piece: Piece
    plan: Plan | None
    oids: list[int] = field(default_factory=list)
    columns: list[Column] | None = None
    cursor_plan: Plan | None = None


@dataclass(slots=True, kw_only=True)
class Bound:
    """A statement with values. `result_formats`: as the client gave them."""

    prepared: Prepared
    parameters: Parameters = field(default_factory=Parameters)
    result_formats: Sequence[int] = ()
    portal: Portal | None = None
    is_done: bool = False


class Statements:
    """Statements of one connection."""

    def __init__(self, context: Context, session: Session, process_id: int) -> None:
        self._context = context
        self._session = session
        self._process_id = process_id
        self._prepared: dict[str, Prepared] = {}
        self._bound: dict[str, Bound] = {}
        self._cursors: dict[str, Portal] = {}

    async def close(self) -> None:
        """Ends all portals."""
        await self._close_portals(with_hold=True)

    async def sync(self) -> None:
        """Ends the implicit transaction of all statements since the last Sync."""
        if self._session.status == "I":
            await self._close_portals(with_hold=False)

    async def _close_portals(self, *, with_hold: bool) -> None:
        bound, self._bound = self._bound, {}
        for item in bound.values():
            if item.portal is not None:
                await item.portal.close()
        for name, cursor in list(self._cursors.items()):
            if with_hold or not cursor.is_hold:
                del self._cursors[name]
                await cursor.close()

    # ---- simple queries

    async def simple(self, text: str, send: Send) -> None:
        """Runs the statements of a text, one after the other, up to the first that fails. Raises PgError."""
        self._check_size(text)
        pieces = commands.split(text)
        if not pieces:
            await send(protocol.EMPTY_QUERY)
        for piece in pieces:
            with _placed(piece):
                prepared = await self._prepare(piece, (), describe=False, may_have_parameters=False)
                bound = Bound(prepared=prepared)
                try:
                    await self._run(bound, None, send, with_description=True)
                finally:
                    if bound.portal is not None:
                        await bound.portal.close()

    # ---- extended queries

    async def parse(self, message: protocol.Parse) -> None:
        """Prepares a statement. Raises PgError."""
        self._check_size(message.text)
        pieces = commands.split(message.text)
        if len(pieces) > 1:
            raise PgError("42601", "cannot insert multiple commands into a prepared statement")
        limit = self._context.settings.sql_pg_statements_max
        if message.statement and message.statement in self._prepared:
            raise PgError("42P05", f'prepared statement "{message.statement}" already exists')
        if message.statement and len(self._prepared.keys() - {""}) >= limit:
            raise PgError("53400", f"there are {limit} prepared statements (sql_pg_statements_max)")
        if not pieces:
            self._prepared[message.statement] = Prepared(piece=Piece("", 0), plan=None)
            return
        with _placed(pieces[0]):
            self._prepared[message.statement] = await self._prepare(pieces[0], message.oids, describe=True)

    async def bind(self, message: protocol.Bind) -> None:
        """Makes a portal of a statement and values. Raises PgError."""
        prepared = self._statement(message.statement)
        self._check_failed(prepared.plan)
        if len(message.values) != len(prepared.oids):
            raise PgError(
                "08P01",
                f"bind message supplies {len(message.values)} parameters, but prepared statement "
                f'"{message.statement}" requires {len(prepared.oids)}',
            )
        if message.portal and (message.portal in self._bound or message.portal in self._cursors):
            raise PgError("42P03", f'cursor "{message.portal}" already exists')
        if message.portal:
            self._check_portals()
        forms = formats_for(message.formats, len(message.values), "parameter")
        formats_for(message.result_formats, len(prepared.columns or ()), "result column")
        used = _numbers_of(prepared.cursor_plan or prepared.plan)
        kinds, values = {}, {}
        for number, (data, form, oid) in enumerate(zip(message.values, forms, prepared.oids, strict=True), 1):
            value, kind = decoded(number, data, form, oid)
            if number in used:
                values[number], kinds[number] = value, kind
        await self.close_named("P", message.portal)  # the unnamed portal is replaced, and its query ends
        self._bound[message.portal] = Bound(
            prepared=prepared, parameters=Parameters(kinds, values), result_formats=message.result_formats
        )

    async def describe_statement(self, name: str) -> bytes:
        """Returns ParameterDescription, and RowDescription or NoData. Raises PgError."""
        prepared = self._statement(name)
        columns = prepared.columns
        if isinstance(prepared.plan, commands.Fetch):
            columns = await self._cursor(prepared.plan.name).open()
        rows = row_description(columns, [0] * len(columns)) if columns is not None else protocol.NO_DATA
        return protocol.parameter_description(prepared.oids) + rows

    async def describe_portal(self, name: str) -> bytes:
        """Returns RowDescription or NoData. Raises PgError."""
        if name in self._cursors:
            columns: list[Column] | None = await self._cursors[name].open()
            formats: Sequence[int] = ()
        else:
            bound = self._portal(name)
            columns, formats = bound.prepared.columns, bound.result_formats
            if isinstance(bound.prepared.plan, commands.Fetch):
                columns = await self._cursor(bound.prepared.plan.name).open()
        if columns is None:
            return protocol.NO_DATA
        return row_description(columns, formats_for(formats, len(columns), "result column"))

    async def execute(self, name: str, rows_max: int, send: Send) -> None:
        """Runs a portal, for at most `rows_max` rows if that is above 0. Raises PgError."""
        bound = self._portal(name)
        with _placed(bound.prepared.piece):
            await self._run(bound, rows_max if rows_max > 0 else None, send, with_description=False)

    async def close_named(self, kind: str, name: str) -> None:
        """Closes a statement ("S") or portal ("P"); a name that there is not is no error."""
        if kind == "S":
            self._prepared.pop(name, None)
        elif (bound := self._bound.pop(name, None)) is not None and bound.portal is not None:
            await bound.portal.close()
        elif name in self._cursors:
            await self._cursors.pop(name).close()

    def _check_portals(self) -> None:
        limit = self._context.settings.sql_pg_statements_max
        if len(self._bound.keys() - {""}) + len(self._cursors) >= limit:
            raise PgError("53400", f"there are {limit} portals (sql_pg_statements_max)")

    def _statement(self, name: str) -> Prepared:
        if name not in self._prepared:
            raise PgError("26000", f'prepared statement "{name}" does not exist')
        return self._prepared[name]

    def _portal(self, name: str) -> Bound:
        if name not in self._bound:
            raise PgError("34000", f'portal "{name}" does not exist')
        return self._bound[name]

    def _cursor(self, name: str) -> Portal:
        if name in self._cursors:
            return self._cursors[name]
        bound = self._bound.get(name)
        if bound is not None and bound.portal is not None:
            return bound.portal
        raise PgError("34000", f'cursor "{name}" does not exist')

    # ---- preparing

    async def _prepare(
        self, piece: Piece, oids: Sequence[int], *, describe: bool, may_have_parameters: bool = True
    ) -> Prepared:
        plan = await self._plan(piece)
        self._check_failed(plan)
        prepared = Prepared(piece=piece, plan=plan)
        if isinstance(plan, commands.Declare):
            inner = await self._prepare(plan.query, oids, describe=describe, may_have_parameters=may_have_parameters)
            return replace(prepared, oids=inner.oids, cursor_plan=inner.plan)
        tree = _tree_of(plan)
        if tree is not None:
            prepared.oids = _oids(tree, oids, self._context.catalogue.column_types(tree))
            if isinstance(plan, CatalogueQuery):  # its UINTEGERs are OIDs
                found = inferred(tree)
                for number, kind in found.items():
                    if kind in _OIDS and (number > len(oids) or not oids[number - 1]):
                        prepared.oids[number - 1] = _OIDS[kind].oid
            if prepared.oids and not may_have_parameters:
                raise PgError("42P02", "there is no parameter $1: a simple query has no values for parameters")
        if describe:
            prepared.columns = await self._columns(prepared)
        return prepared

    async def _plan(self, piece: Piece) -> Plan:
        if (command := commands.command_of(piece)) is not None:
            return command
        catalogued = self._context.catalogue.query_of(
            piece.text, self._session, self._process_id, list(self._cursors), list(self._prepared)
        )
        if catalogued is not None:
            return catalogued
        # In a thread, as in `SqlService.execute`: a large text takes its parser a second.
        statement = await asyncio.to_thread(parse_any, piece.text, parameters=True)
        if isinstance(statement, ContinuousQuery) and statement.kind == "live":
            # psql and drivers show a result once it is complete: they would gather rows, and show none.
            raise PgError(
                "0A000",
                f"EMIT {(statement.emit or '').upper()}: a live query has no end, and PostgreSQL's clients wait for "
                "it; `streamhouse sql` and the SDK read its changes as they come",
            )
        if isinstance(statement, Explain) and numbers(statement.query.tree):
            raise PgError("0A000", "EXPLAIN of a statement with parameters is not supported")
        return statement

    async def _columns(self, prepared: Prepared) -> list[Column] | None:
        """Returns the columns of a statement's result without running it."""
        plan = prepared.plan
        if isinstance(plan, commands.Show):
            return await self._show_columns(plan)
        if isinstance(plan, commands.Fetch) and not plan.is_move:
            return None  # the cursor may not be there yet
        if isinstance(plan, Query | CatalogueQuery):
            kinds = {number: duck_type(prepared.oids[number - 1]) for number in _numbers_of(plan)}
            parameters = Parameters(kinds, dict.fromkeys(kinds))
            if isinstance(plan, CatalogueQuery):
                return self._named(await self._context.catalogue.describe(plan, parameters))
            bound = await self._context.service.bind_all_columns(plan, parameters)
            return _renamed(plan, columns_of(await self._context.catalogue.describe_bound(bound)))
        described = _FIXED_COLUMNS.get(type(plan))
        return columns_of(described) if described else None

    def _named(self, described: Sequence[tuple[str, str]]) -> list[Column]:
        """Returns the columns of the catalogue: its UINTEGERs are OIDs."""
        return [
            replace(column, type=_OIDS.get(kind, column.type))
            for column, (_, kind) in zip(columns_of(described), described, strict=True)
        ]

    async def _show_columns(self, show: commands.Show) -> list[Column]:
        if show.name == "all":
            return [Column("name", _TEXT), Column("setting", _TEXT), Column("description", _TEXT)]
        self._session.get(show.name)
        return [Column(show.name, _TEXT)]

    # ---- running

    async def _run(self, bound: Bound, rows_max: int | None, send: Send, *, with_description: bool) -> None:
        plan = bound.prepared.plan
        if plan is None:
            await send(protocol.EMPTY_QUERY)
            return
        self._check_failed(plan)
        if isinstance(plan, commands.Fetch):
            cursor = self._cursor(plan.name)
            verb = "MOVE" if plan.is_move else "FETCH"
            sent = plan.count if rows_max is None else rows_max if plan.count is None else min(plan.count, rows_max)
            if bound.is_done:
                await send(protocol.command_complete(f"{verb} 0"))
                return
            bound.is_done = True
            await self._rows(cursor, bound, sent, send, verb, with_description, is_move=plan.is_move)
            return
        if isinstance(plan, CreateTable | DropTable):
            if not bound.is_done:
                bound.is_done = True
                await self._context.service.command(plan, self._timeout_ms)
                verb = "CREATE" if isinstance(plan, CreateTable) else "DROP"
                await send(protocol.command_complete(f"{verb} TABLE"))
            return
        if isinstance(plan, ContinuousQuery | DropJob | AlterJob):
            if not bound.is_done:
                bound.is_done = True
                done = await self._context.service.command(plan, self._timeout_ms)
                for line in done.column("status").to_pylist()[1:]:
                    await send(protocol.notice_response(severity="NOTICE", sqlstate="00000", message=line))
                await send(protocol.command_complete(tag_of(plan)))
            return
        if isinstance(plan, commands.Command) and not isinstance(plan, commands.Show):
            if not bound.is_done:
                bound.is_done = True
                await send(await self._command(plan, bound))
            return
        if bound.portal is None:
            bound.portal = Portal(lambda: self._open(plan, bound.parameters), bound.prepared.columns)
        await self._rows(bound.portal, bound, rows_max, send, _verb(plan), with_description)

    async def _rows(
        self,
        portal: Portal,
        bound: Bound,
        rows_max: int | None,
        send: Send,
        verb: str,
        with_description: bool,
        *,
        is_move: bool = False,
    ) -> None:
        columns = await portal.open()
        formats = formats_for(bound.result_formats, len(columns), "result column")
        if with_description and not is_move:
            await send(row_description(columns, formats))
        count = 0
        async for batch in portal.take(rows_max):
            count += batch.num_rows
            if not is_move:
                await send(await encode(batch, columns, formats, self._context.threads))
        is_suspended = rows_max is not None and count == rows_max and verb not in ("FETCH", "MOVE")
        tag = verb if verb in ("SHOW", "EXPLAIN") else f"{verb} {count}"
        await send(protocol.PORTAL_SUSPENDED if is_suspended else protocol.command_complete(tag))

    @property
    def _timeout_ms(self) -> int:
        return self._session.timeout_ms(self._context.settings.sql_timeout_ms)

    async def _open(self, plan: Plan, parameters: Parameters) -> Source:
        timeout_ms = self._timeout_ms
        if isinstance(plan, Query):
            rows = QueryRows(await self._context.service.open(plan, parameters, timeout_ms, cast=cast_of))
            rows.columns = _renamed(plan, rows.columns)
            return rows
        if isinstance(plan, CatalogueQuery):
            for name, value, is_local in plan.settings:
                self._session.set(name, value, is_local=is_local)
            described, batches = await self._context.catalogue.run(plan, parameters, timeout_ms)
            return Batches(self._named(described), batches)
        if isinstance(plan, commands.Show):
            return self._shown(plan, await self._show_columns(plan))
        assert isinstance(plan, Explain | ShowTables | Describe | ExplainContinuous | ShowJobs), "others have no rows"
        batch = await self._context.service.command(plan, timeout_ms)
        return Batches(columns_of(_FIXED_COLUMNS[type(plan)]), [batch])

    def _shown(self, show: commands.Show, columns: list[Column]) -> Source:
        settings = self._session.all() if show.name == "all" else {show.name: self._session.get(show.name)}
        rows: list[list[str]] = [list(settings.values())]
        if show.name == "all":
            rows = [list(settings), list(settings.values()), [""] * len(settings)]
        arrays = [pa.array(row, pa.string()) for row in rows]
        return Batches(columns, [pa.RecordBatch.from_arrays(arrays, names=[f"c{at}" for at in range(len(arrays))])])

    def _check_failed(self, plan: Plan | None) -> None:
        is_way_out = isinstance(plan, commands.End) or (
            isinstance(plan, commands.Savepoint) and plan.what == "ROLLBACK"
        )
        if self._session.status == "E" and not is_way_out:
            raise PgError("25P02", "current transaction is aborted, commands ignored until end of transaction block")

    def _check_size(self, text: str) -> None:
        limit = self._context.settings.sql_statement_bytes_max
        if (size_bytes := len(text.encode())) > limit:
            raise PgError("54000", f"the statement has {size_bytes} bytes, sql_statement_bytes_max is {limit}")

    # ---- statements about the session

    async def _command(self, command: commands.Command, bound: Bound) -> bytes:
        """Carries a command out. Returns the messages that answer it."""
        session = self._session
        match command:
            case commands.Begin():
                if session.begin():
                    return protocol.command_complete("BEGIN")
                return _warning("25001", "there is already a transaction in progress", "BEGIN")
            case commands.End():
                return await self._end(command)
            case commands.Savepoint(what, name):
                session.savepoint(what, name)
                return protocol.command_complete(what)
            case commands.Set():
                return self._set(command)
            case commands.Reset(name):
                return self._reset(name)
            case commands.Deallocate(None):
                self._prepared.clear()
                return protocol.command_complete("DEALLOCATE ALL")
            case commands.Deallocate(str(statement)):
                self._statement(statement)
                del self._prepared[statement]
                return protocol.command_complete("DEALLOCATE")
            case commands.Discard(what):
                return await self._discard(what)
            case commands.Declare():
                self._declare(command, bound)
                return protocol.command_complete("DECLARE CURSOR")
            case commands.CloseCursor(None):
                for cursor in self._cursors.values():
                    await cursor.close()
                self._cursors.clear()
                return protocol.command_complete("CLOSE CURSOR ALL")
            case commands.CloseCursor(str(cursor_name)):
                await self._cursor(cursor_name).close()
                await self.close_named("P", cursor_name)
                return protocol.command_complete("CLOSE CURSOR")
            case commands.Nothing(tag):
                return protocol.command_complete(tag)
        raise AssertionError(f"{command} is answered elsewhere")

    async def _end(self, command: commands.End) -> bytes:
        session = self._session
        was_outside, before = session.status == "I", session.reported()
        is_committed = session.end(is_commit=command.is_commit)
        bound, self._bound = self._bound, {}
        for item in bound.values():
            if item.portal is not None:
                await item.portal.close()
        for name, cursor in list(self._cursors.items()):
            if not cursor.is_hold:
                del self._cursors[name]
                await cursor.close()
        tag = "COMMIT" if is_committed else "ROLLBACK"
        told = b"".join(
            protocol.parameter_status(name, value)
            for name, value in session.reported().items()
            if before[name] != value
        )
        if was_outside:
            return _warning("25P01", "there is no transaction in progress", tag)
        return told + protocol.command_complete(tag)

    def _set(self, command: commands.Set) -> bytes:
        session = self._session
        told = session.set(command.name, command.value, is_local=command.is_local)
        if command.is_local and session.status == "I":
            return _warning("25P01", "SET LOCAL can only be used in transaction blocks", "SET")
        status = protocol.parameter_status(told, session.get(told)) if told else b""
        return status + protocol.command_complete("SET")

    def _reset(self, name: str | None, tag: str = "RESET") -> bytes:
        session = self._session
        told = session.reset_all() if name is None else [session.set(name, None)]
        statuses = (protocol.parameter_status(shown, session.get(shown)) for shown in told if shown)
        return b"".join(statuses) + protocol.command_complete(tag)

    async def _discard(self, what: str) -> bytes:
        if what != "ALL":
            return protocol.command_complete(f"DISCARD {what}")
        if self._session.status != "I":
            raise PgError("25001", "DISCARD ALL cannot run inside a transaction block")
        self._prepared.clear()
        for cursor in self._cursors.values():
            await cursor.close()
        self._cursors.clear()
        return self._reset(None, "DISCARD ALL")

    def _declare(self, command: commands.Declare, bound: Bound) -> None:
        if self._session.status == "I" and not command.is_hold:
            raise PgError("25P01", "DECLARE CURSOR can only be used in transaction blocks")
        if command.name in self._cursors or command.name in self._bound:
            raise PgError("42P03", f'cursor "{command.name}" already exists')
        self._check_portals()
        plan, parameters = bound.prepared.cursor_plan, bound.parameters
        if not isinstance(plan, Query | CatalogueQuery):
            raise PgError("42601", "a cursor is declared for a query", position=1)
        self._cursors[command.name] = Portal(lambda: self._open(plan, parameters), None, is_hold=command.is_hold)


def _oids(tree: Any, declared: Sequence[int], columns: Mapping[str, str]) -> list[int]:
    """Returns the types of a statement's parameters: as declared, else as the text gives them."""
    found = inferred(tree, columns)
    count = max([*found, len(declared)], default=0)
    oids = [*declared, *[0] * (count - len(declared))]
    for at, oid in enumerate(oids):
        if duck_type(oid) == "":  # unspecified
            oids[at] = types.parameter_oid(found.get(at + 1, ""))
    return oids


def _renamed(query: Query, columns: list[Column]) -> list[Column]:
    """Returns the columns of a query; those that are expressions of parameters are called as PostgreSQL does, and not
    by the text that DuckDB was given."""
    unnamed = unnamed_columns(query.tree)
    if len(unnamed) != len(columns):  # a star stands for some of them
        return columns
    return [
        replace(column, name="?column?") if is_unnamed else column
        for is_unnamed, column in zip(unnamed, columns, strict=True)
    ]


def _tree_of(plan: Plan | None) -> Any:
    return plan.tree if isinstance(plan, Query | CatalogueQuery) else None


def _numbers_of(plan: Plan | None) -> set[int]:
    tree = _tree_of(plan)
    return set(numbers(tree)) if tree is not None else set()


def _verb(plan: Plan) -> str:
    if isinstance(plan, commands.Show):
        return "SHOW"
    return "EXPLAIN" if isinstance(plan, Explain | ExplainContinuous) else "SELECT"


def _warning(sqlstate: str, message: str, tag: str) -> bytes:
    notice = protocol.notice_response(severity="WARNING", sqlstate=sqlstate, message=message)
    return notice + protocol.command_complete(tag)


class _placed:
    """Gives the errors of a statement their place in the client's text."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, StreamHouseError):
            raise from_ours(error, self._piece.text, shift=self._piece.at) from error
