"""Migrates a database to the tables of this version. Two coordinators may start at the same time.

Invariant: migrations are only added. A migration that was changed afterwards would leave existing databases different
from new ones: a test holds their hashes.
"""

from importlib import resources
from typing import Any

import asyncpg

from streamhouse_coordinator.adapters import migrations
from streamhouse_coordinator.core.tables import EVENTS, PROJECTIONS, STATE, Table, base_of

# Any number that no other program uses as an advisory lock in this database ("sh" + "mig").
MIGRATION_LOCK = 0x73686D6967

_WAY_OUT = "restore a backup into an empty database, see docs/backup.md"


class DatabaseRefused(RuntimeError):
    """A database that this version cannot use; the message says why, and how to proceed."""


class DatabaseTooNew(DatabaseRefused):
    """The database was migrated by a newer version; this version must not touch it."""


class DatabaseMismatch(DatabaseRefused):
    """The tables differ from those of the migrations: no release made them, or they were changed by hand."""


def available() -> dict[str, str]:
    """Returns the SQL by migration name, in order."""
    files = (item for item in resources.files(migrations).iterdir() if item.name.endswith(".sql"))
    return {item.name.removesuffix(".sql"): item.read_text() for item in sorted(files, key=lambda item: item.name)}


async def migrate(connection: Any) -> list[str]:
    """Applies the missing migrations, all or none; returns their names. Waits for other coordinators that migrate.
    Raises DatabaseRefused."""
    # A single transaction, so that a pooler may lie in between: a lock of the session would stay with another's
    # connection. Without a limit, also where the user or the database have limits.
    async with connection.transaction():
        for limit in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
            await connection.execute(f"SET LOCAL {limit} = 0")
        return await _migrate(connection)


async def _migrate(connection: Any) -> list[str]:
    await connection.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    # Read under the lock: another coordinator may have applied all of them during the wait.
    done = {row["name"] for row in await connection.fetch("SELECT name FROM migrations")}
    known = available()
    if unknown := done - set(known):
        raise DatabaseTooNew(f"the database has migrations this version does not know: {', '.join(sorted(unknown))}")
    missing = [name for name in known if name not in done]
    for name in missing:
        try:
            await connection.execute(known[name])
        except asyncpg.InsufficientPrivilegeError:
            raise  # the privilege may be granted later
        except asyncpg.SyntaxOrAccessError as error:  # a table or column is missing, or exists already
            raise DatabaseMismatch(f"migration {name} does not fit the database: {error}; {_WAY_OUT}") from error
        await connection.execute("INSERT INTO migrations (name) VALUES ($1)", name)
    await _must_have_tables(connection)
    return missing


async def _must_have_tables(connection: Any) -> None:
    """Checks that all tables and columns exist: a command that met a missing column later would fail as if by a defect,
    at every try. Raises DatabaseRefused."""
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
            f"it was changed by hand; {_WAY_OUT}"
        )
