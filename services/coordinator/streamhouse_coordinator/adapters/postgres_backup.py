"""What backups and restores need of PostgreSQL beyond the store: a whole database as of one moment, and an empty one to
fill. Errors of the database end here, as in postgres.py."""

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

# A statement reads or writes some thousand rows; a database that takes longer than this does not work.
STATEMENT_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 30.0
# In ms. Between two statements an object of 256 MiB may be on its way to the store.
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
    """One moment of the database, for as long as it is open. Changes nothing, not even its tables. Raises Unavailable;
    InvalidArgument for a database that is not, or not yet, one of this version."""
    async with _connected(dsn) as connection:
        await connection.execute(begin(LIMITS, "ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        await _must_be_ours(connection)
        yield PostgresSnapshot(connection)


@asynccontextmanager
async def restore_transaction(dsn: str, *, commit: bool) -> AsyncIterator[RestoreTransaction]:
    """A transaction over the whole database, which gets its tables first; rolled back at its end unless `commit`.
    Raises Unavailable, DatabaseRefused; InvalidArgument where there are tables that are not ours."""
    async with _connected(dsn) as connection:
        async with connection.transaction():
            await _must_be_free(connection)
        await migrate(connection)
        await connection.execute(begin(LIMITS))
        await connection.execute("LOCK TABLE event_position, sessions, histories IN EXCLUSIVE MODE")
        yield PostgresRestoring(connection)
        await connection.execute("COMMIT" if commit else "ROLLBACK")


@asynccontextmanager
async def _connected(dsn: str) -> AsyncIterator[Any]:
    """A connection that may lead through a pooler: what is done with it is done in transactions. One that is open when
    the connection is closed is rolled back."""
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
