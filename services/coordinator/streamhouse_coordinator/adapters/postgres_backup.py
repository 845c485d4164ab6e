"""PostgreSQL for backups and restores: a whole database as of a single moment, and an empty database to fill. Errors of
the database end here, as in postgres.py."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from shproto.errors import InvalidArgument
from shproto.events import Event

from streamhouse_coordinator.adapters.migrate import available, migrate
from streamhouse_coordinator.adapters.postgres_connections import begin
from streamhouse_coordinator.adapters.postgres_errors import FAILURES, translated
from streamhouse_coordinator.adapters.postgres_hosts import Hosts
from streamhouse_coordinator.adapters.postgres_transaction import PostgresRebuilding, PostgresTransaction
from streamhouse_coordinator.core.tables import EVENTS, HISTORIES, PROJECTIONS, PRUNED, STATE, Table, base_of
from streamhouse_coordinator.ports import RestoreTransaction, Snapshot

# A statement reads or writes some thousand rows; a database that takes longer is broken.
STATEMENT_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 30.0
# In ms. An object of 256 MiB may be uploaded between two statements.
LIMITS = {
    "statement_timeout": "300000",
    "lock_timeout": "60000",
    "idle_in_transaction_session_timeout": "900000",
}


class PostgresSnapshot(PostgresTransaction):
    """Implements ports.Snapshot."""

    async def producer_id(self) -> int:
        number: int = await self._connection.fetchval("SELECT last_value FROM producer_ids")
        return number

    async def migrations(self) -> list[str]:
        return [row["name"] for row in await self._connection.fetch("SELECT name FROM migrations ORDER BY name")]


class PostgresRestoring(PostgresRebuilding):
    """Implements ports.RestoreTransaction."""

    async def append(self, events: Sequence[Event], trace_context: str = "") -> None:
        await super().append(events, trace_context)
        await self.finish()

    async def found(self) -> list[str]:
        counts = []
        tables: list[Table[Any]] = [EVENTS, *PROJECTIONS, *map(base_of, PROJECTIONS), *STATE]
        for table in tables:
            if table.name not in (HISTORIES.name, PRUNED.name):
                count = await self._connection.fetchval(f'SELECT count(*) FROM "{table.name}"')
                counts += [f"{count} rows in {table.name}"] if count else []
        return counts

    async def set_position(self, position: int) -> None:
        await self._connection.execute("UPDATE event_position SET position = $1", position)
        await self._connection.execute("UPDATE outbox SET position = $1", position)

    async def set_producer_id(self, producer_id: int) -> None:
        await self._connection.execute("SELECT setval('producer_ids', $1)", producer_id)


@asynccontextmanager
async def snapshot(dsn: str) -> AsyncIterator[Snapshot]:
    """Opens a view of a single moment of the database. Changes nothing, not even tables. Raises Unavailable;
    InvalidArgument for a database without the tables of this version."""
    async with _connected(dsn) as connection:
        await connection.execute(begin(LIMITS, "ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        await _must_be_ours(connection)
        yield PostgresSnapshot(connection)


@asynccontextmanager
async def restore_transaction(dsn: str, *, commit: bool) -> AsyncIterator[RestoreTransaction]:
    """Opens a transaction over the whole database and creates the tables; rolls back at the end unless `commit`. Raises
    Unavailable, DatabaseRefused; InvalidArgument if there are foreign tables."""
    async with _connected(dsn) as connection:
        async with connection.transaction():
            await _must_be_free(connection)
        await migrate(connection)
        await connection.execute(begin(LIMITS))
        # A coordinator that is started too early waits here, and writes nothing beside the restore.
        await connection.execute("LOCK TABLE event_position, sessions, histories IN EXCLUSIVE MODE")
        yield PostgresRestoring(connection)
        await connection.execute("COMMIT" if commit else "ROLLBACK")


@asynccontextmanager
async def _connected(dsn: str) -> AsyncIterator[Any]:
    """Opens a connection that may lead through a pooler, so all work has to be in transactions. Closing rolls back an
    open transaction."""
    options = {"command_timeout": STATEMENT_TIMEOUT_S, "statement_cache_size": 0}
    try:
        connection = await Hosts(dsn).connect(timeout_s=CONNECT_TIMEOUT_S, **options)
        try:
            yield connection
        finally:
            await connection.close(timeout=CONNECT_TIMEOUT_S)
    except FAILURES as error:
        raise translated(error) from error


async def _tables(connection: Any) -> list[str]:
    rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = current_schema() ORDER BY 1")
    return [row["tablename"] for row in rows]


async def _must_be_ours(connection: Any) -> None:
    if "migrations" not in await _tables(connection):
        raise InvalidArgument("the database is not one of StreamHouse: it has no table migrations", field="pg_dsn")
    done = {row["name"] for row in await connection.fetch("SELECT name FROM migrations")}
    if done != set(available()):
        raise InvalidArgument(
            f"the database is of another version: it has the migrations {', '.join(sorted(done))}, this program knows "
            f"{', '.join(sorted(available()))}; back it up with the version its coordinators run",
            field="pg_dsn",
        )


async def _must_be_free(connection: Any) -> None:
    tables = await _tables(connection)
    if tables and "migrations" not in tables:
        raise InvalidArgument(
            f"the database is not empty: it has the tables {', '.join(tables)}; restore into a new one", field="pg_dsn"
        )
