"""Brings a database to the tables this version works with. Two coordinators may start at the same time.

Migrations are only ever added. One that was changed afterwards would leave every database that had it already
different from a new one: a test holds their hashes.
"""

from importlib import resources
from typing import Any

import asyncpg

from streamhouse_coordinator.adapters import migrations
from streamhouse_coordinator.core.tables import EVENTS, PROJECTIONS, STATE, Table, base_of

# Any number will do, as long as no other program takes the same advisory lock in this database ("sh" + "mig").
MIGRATION_LOCK = 0x73686D6967

_WAY_OUT = "restore a backup into an empty database, see docs/backup.md"


class DatabaseRefused(RuntimeError):
    """A database that this version cannot work with; the message says why, and what to do."""


class DatabaseTooNew(DatabaseRefused):
    """The database was migrated by a newer version; this one must not touch it."""


class DatabaseMismatch(DatabaseRefused):
    """The database has other tables than its migrations make: no release made it, or somebody changed it."""


def available() -> dict[str, str]:
    """SQL by migration name, in order."""
    files = (item for item in resources.files(migrations).iterdir() if item.name.endswith(".sql"))
    return {item.name.removesuffix(".sql"): item.read_text() for item in sorted(files, key=lambda item: item.name)}


async def migrate(connection: Any) -> list[str]:
    """Applies what is missing, all of it or nothing; returns the names. Waits for others that migrate. Raises
    DatabaseRefused."""
    # One transaction, so that a pooler may lie in between: a lock of the session would stay with another's connection.
    # It takes as long as it takes, whatever limits the user or the database have.
    async with connection.transaction():
        for limit in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
            await connection.execute(f"SET LOCAL {limit} = 0")
        return await _migrate(connection)


async def _migrate(connection: Any) -> list[str]:
    await connection.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    done = {row["name"] for row in await connection.fetch("SELECT name FROM migrations")}
    known = available()
    if unknown := done - set(known):
        raise DatabaseTooNew(f"the database has migrations this version does not know: {', '.join(sorted(unknown))}")
    missing = [name for name in known if name not in done]
    for name in missing:
        try:
            await connection.execute(known[name])
        except asyncpg.InsufficientPrivilegeError:
            raise  # may be granted later
        except asyncpg.SyntaxOrAccessError as error:  # a table or column that is missing, or there already
            raise DatabaseMismatch(f"migration {name} does not fit the database: {error}; {_WAY_OUT}") from error
        await connection.execute("INSERT INTO migrations (name) VALUES ($1)", name)
    await _must_have_tables(connection)
    return missing


async def _must_have_tables(connection: Any) -> None:
    """Checks that all tables and columns are there: a command that met a missing one later would fail as if by a
    defect, and again at every try."""
    rows = await connection.fetch(
        "SELECT relname, attname FROM pg_attribute JOIN pg_class ON attrelid = pg_class.oid "
        "WHERE relnamespace = current_schema()::regnamespace AND attnum > 0 AND NOT attisdropped"
    )
    found = {(row["relname"], row["attname"]) for row in rows}
    tables: tuple[Table[Any], ...] = (*PROJECTIONS, *map(base_of, PROJECTIONS), *STATE, EVENTS)
    wanted = ((table.name, column) for table in tables for column in table.columns)
    if lacking := [f"{table}.{column}" for table, column in wanted if (table, column) not in found]:
        raise DatabaseMismatch(
            f"the database has every migration of this version, but not {', '.join(lacking)}: no release made it, or "
            f"somebody has changed it; {_WAY_OUT}"
        )
